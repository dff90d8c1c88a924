"""Denoising models of diffusers, known by their classes."""

from petl_ext.attaching.families.record import Family

_BLOCK = r"transformer_blocks\.\d+"
_SITES = {
    "apt": rf"{_BLOCK}\.attn[12]",
    "sequential_adapter": rf"{_BLOCK}\.(attn[12]|ff)",
    "parallel_adapter": rf"{_BLOCK}\.attn[12]",
}
# Both streams of each joint attention; SD3.5 has a second attention, attn2, of the images alone in some blocks.
_JOINT_SITES = {
    "apt": rf"(?<!single_){_BLOCK}\.attn2?",
    "sequential_adapter": rf"(?<!single_){_BLOCK}\.(attn2?|ff|ff_context)",
    "parallel_adapter": rf"(?<!single_){_BLOCK}\.attn2?",
}
_NO_SKIPPING = "its blocks take the timestep, text or a second stream besides, which a bypass does not see"
_SINGLE = "not in single_transformer_blocks, where one projection ends attention and MLP together"

FAMILIES = (
    *(
        Family(name, _SITES, limits={"bypass": _NO_SKIPPING})
        for name in ("UNet2DConditionModel", "PixArtTransformer2DModel")
    ),
    Family("SD3Transformer2DModel", _JOINT_SITES, limits={"bypass": _NO_SKIPPING}),
    Family(
        "FluxTransformer2DModel",
        _JOINT_SITES,
        limits={"bypass": _NO_SKIPPING, **dict.fromkeys(_JOINT_SITES, _SINGLE)},
    ),
)
