"""Which code base a file is of, told by its keys."""

from petl_ext.models.checkpoints.rules import pattern
from petl_ext.printing import listed

VILT, METER = "an original ViLT checkpoint", "an original METER checkpoint"
DVP = {
    "bert": "an original DVP checkpoint on BERT",
    "t5": "an original DVP checkpoint on T5",
    "llama": "an original DVP checkpoint on LLaMA",
}
_NOT_ORIGINAL = "use from_pretrained, or load_state_dict of a model of the same class"
# What a file is, by the first line that any of its keys matches, and what to do with it.
ORIGINS = (
    ("vit_model.visual.{rest}", METER, "use load_meter_checkpoint"),
    ("transformer.blocks.{i}.attn.qkv.weight", VILT, "use load_vilt_checkpoint"),
    ("bert_model.{rest}", DVP["bert"], "use load_dvp_checkpoint with a DVPBert"),
    ("t5_model.{rest}", DVP["t5"], "use load_dvp_checkpoint with a DVPT5"),
    ("llama_model.{rest}", DVP["llama"], "use load_dvp_checkpoint with a DVPLlama"),
    ("vit_model.layers.{rest}", "a METER with a Swin image encoder", "the METER here has CLIP's"),
    ("vit_model.embeddings.{rest}", "a state dict of the MeterModel of petl_ext", _NOT_ORIGINAL),
    ("meter.{rest}", "a state dict of a METER of petl_ext", _NOT_ORIGINAL),
    ("vilt.{rest}", "a state dict of a Hugging Face ViLT", _NOT_ORIGINAL),
    ("embeddings.text_embeddings.{rest}", "a state dict of a Hugging Face ViltModel", _NOT_ORIGINAL),
    ("language_model.{rest}", "a state dict of a DVP of petl_ext", "use load_state_dict of a model of the same class"),
    ("module.{rest}", "a state dict of a model in DataParallel", 'take the leading "module." off its keys'),
)


def check_origin(checkpoint, origin):
    """Raises ValueError where the file is not what is expected."""
    name, tensors = checkpoint.name, checkpoint.tensors
    found = ((what, advice) for line, what, advice in ORIGINS if any(map(pattern(line).fullmatch, tensors)))
    what, advice = next(found, ("", ""))
    if what == origin:
        return
    if what:
        raise ValueError(f"{name} seems to be {what}, not {origin}: {advice}")
    raise ValueError(f"{name} is not {origin}; its keys are {listed(list(tensors))}")
