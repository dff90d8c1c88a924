"""Attentions and MLPs that end in a projection back to the width that they read: CLIP, T5, LLaMA, diffusers.

Residual, dropout and norm stand in the block around them, so a new layer needs the module's input and its output and
nothing from between. They are found by the names of their projections. Names do not tell what comes last, so a module
that holds more than is known here, which might be a gate or a norm behind the projection, is refused.
"""

import inspect
from typing import ClassVar

from torch import nn

from petl_ext.attaching.sites.site import Site

# Dotted names of their projections, in which the first reads the module's input and the last makes its output, and what
# else such a module may hold because it acts before the last one, on scores, queries, keys or values.
SCORES = (
    *("relative_attention_bias", "relative_position_bias", "rotary_emb", "sinks", "attn_drop"),
    *("q_bias", "k_bias", "v_bias", "relative_position_bias_table"),
    *("q_norm", "k_norm", "v_norm", "qk_norm", "norm_q", "norm_k", "norm_cross", "norm_added_q", "norm_added_k"),
)
# diffusers' fused projections and processors, and its joint attentions, which have projections for two streams.
DIFFUSERS = ("to_qkv", "to_kv", "processor")
JOINT = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0")
ATTENTIONS = {
    ("q_proj", "k_proj", "v_proj", "out_proj"): SCORES,
    ("q_proj", "k_proj", "v_proj", "o_proj"): SCORES,
    ("q_proj", "k_proj", "v_proj", "projection_layer"): SCORES,
    # Gemma 4: its vision tower clips what goes into a projection and comes out of it; full attentions may take keys for
    # values, and the last layers both from an earlier one.
    tuple(f"{name}.linear" for name in ("q_proj", "k_proj", "v_proj", "o_proj")): SCORES,
    ("q_proj", "k_proj", "o_proj"): SCORES,
    ("q_proj", "o_proj"): SCORES,
    # timm's EVA, whose norm stands before the last projection.
    ("q_proj", "k_proj", "v_proj", "proj"): (*SCORES, "norm"),
    ("q", "k", "v", "o"): SCORES,
    JOINT: (*SCORES, *DIFFUSERS, "to_added_qkv", "to_add_out"),
    ("to_q", "to_k", "to_v", "to_out.0"): (*SCORES, *DIFFUSERS),
    ("qkv", "proj"): SCORES,
    ("qkv", "projection"): (*SCORES, "dropout"),
    ("qkv_proj", "o_proj"): SCORES,
    ("Wqkv", "Wo"): SCORES,
    ("q_lin", "k_lin", "v_lin", "out_lin"): (*SCORES, "dropout"),
    # Qwen's linear attention: a convolution, a decay and a gated norm, all before the last projection.
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"): ("conv1d", "dt_bias", "A_log", "norm"),
    ("in_proj_qkvz", "in_proj_ba", "out_proj"): ("conv1d", "dt_bias", "A_log", "norm"),
}
MLPS = dict.fromkeys(
    (
        ("fc1", "fc2"),
        ("gate_proj", "up_proj", "down_proj"),
        ("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
        ("up_proj", "down_proj"),
        ("gate_up_proj", "down_proj"),
        ("wi", "wo"),
        ("wi_0", "wi_1", "wo"),
        ("Wi", "Wo"),
        ("lin1", "lin2"),
        ("linear_fc1", "linear_fc2"),
        ("weights_in", "weights_out"),
        ("net.0.proj", "net.2"),
    ),
    (),
) | {("fc1_g", "fc1_x", "fc2"): ("norm",)}  # timm's SwiGLU


class ProjectionSite(Site):
    """An attention or MLP that takes hidden states [..., D] first and returns the projected ones, alone or in a tuple.

    Attributes:
        projections: of `ATTENTIONS` and `MLPS`, those that can become such a site.
        second_stream: the `SecondStreamSite` that a joint attention becomes besides.
    """

    projections: dict
    second_stream = None

    @classmethod
    def candidates(cls, model):
        return {name: module for name, module in model.named_modules() if _names(module, cls.projections)}

    @classmethod
    def neighbor(cls, module):
        return module.get_submodule(_names(module, cls.projections)[-1])

    @classmethod
    def check(cls, module):
        names = _names(module, cls.projections)
        last = _last_step_problem(module, names, cls.projections[names])
        for problem in (_signature_problem(module), _width_problem(module, names), last):
            if problem:
                raise ValueError(problem)

    def forward(self, hidden_states, *arguments, **named):
        begun = self.begin(hidden_states)
        output = super().forward(hidden_states, *arguments, **named)
        if isinstance(output, tuple):
            return self.finished(hidden_states, output[0], begun), *output[1:]
        return self.finished(hidden_states, output, begun)

    def finished(self, x, y, begun):
        """As `changed`, where `begin` returned `begun`."""
        return self.changed(x, y)

    def changed(self, x, y):
        """The module's new output from its input x and its own output y, all [..., D]."""
        raise NotImplementedError


class SecondStreamSite(ProjectionSite):
    """The second stream of a joint attention, `encoder_hidden_states` [..., D], as in SD3's and Flux's transformers.

    Such an attention returns both streams in a tuple. It becomes a `ProjectionSite` for the first one, whose class
    comes before this in the composed class and whose `changed` is called from there.
    """

    projections: ClassVar[dict] = {
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"): (*ATTENTIONS[JOINT], "to_q", "to_k", "to_v", "to_out")
    }

    @classmethod
    def stands_in(cls, module):
        """Whether the module has a second stream whose output is used."""
        return _names(module, cls.projections) is not None

    def forward(self, hidden_states, encoder_hidden_states=None, *arguments, **named):
        output = super().forward(hidden_states, encoder_hidden_states, *arguments, **named)
        if encoder_hidden_states is None:
            return output
        first, second = output
        return first, self.changed_second(encoder_hidden_states, second)

    def changed_second(self, x, y):
        """The second stream's new output from its input x and its own output y, all [..., D]."""
        raise NotImplementedError


def _names(module, projections):
    """Which of `projections` the module is, or None."""
    return next((names for names in projections if all(_is_linear(_inner(module, name)) for name in names)), None)


def _inner(module, name):
    for child in name.split("."):
        module = module._modules.get(child) if isinstance(module, nn.Module) else None
    return module


def _is_linear(module):
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _signature_problem(module):
    signature = inspect.signature(type(module).forward)
    _, *parameters = signature.parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if required[:1] == ["hidden_states"] or len(required) == 1:
        return None
    return f"its forward must take hidden_states first, got {signature}"


def _width_problem(module, names):
    read, made = module.get_submodule(names[0]).in_features, module.get_submodule(names[-1]).out_features
    return None if read == made else f"{names[-1]} must give the width that {names[0]} takes, {read}, got {made}"


def _last_step_problem(module, names, inside):
    behind = _what_may_come_behind(module, names, inside)
    return f"{names[-1]} must be its last step, but {behind} may come behind" if behind else None


def _what_may_come_behind(module, names, inside):
    """In words; an empty string for nothing. Dropout inside an MLP changes nothing for the layers that go there."""
    known = (*names, *inside)
    others = {
        name: inner
        for name, inner in module.named_modules()
        if not any(f"{name}.".startswith(f"{part}.") for part in known)
    }
    suspects = [f"{name}.{own}".lstrip(".") for name, inner in others.items() for own in inner._parameters]
    suspects = [suspect for suspect in suspects if suspect not in known]
    if names not in MLPS:
        suspects += [f"the dropout {name}" for name, inner in others.items() if _drops(inner)]
    if getattr(module, "residual_connection", False):
        suspects.append("a residual")
    if getattr(module, "rescale_output_factor", 1) != 1:
        suspects.append("a factor")
    return ", ".join(suspects)


def _drops(module):
    return isinstance(module, nn.Dropout) and module.p > 0
