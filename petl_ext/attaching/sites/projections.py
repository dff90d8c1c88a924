"""Attentions and MLPs that end in a projection back to the width that they read: CLIP, T5, LLaMA, diffusers.

Residual, dropout and norm stand in the block around them, so a new layer needs the module's input and its output and
nothing from between. They are found by the names of their projections. Names do not tell what comes last, so a module
that holds more than is known here, which might be a gate or a norm behind the projection, is refused.
"""

import inspect

from torch import nn

from petl_ext.attaching.sites.site import Site

# Dotted names of their projections, in which the first reads the module's input and the last makes its output.
ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q", "k", "v", "o"),
    ("to_q", "to_k", "to_v", "to_out.0"),
)
MLPS = (
    ("fc1", "fc2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("wi", "wo"),
    ("wi_0", "wi_1", "wo"),
    ("net.0.proj", "net.2"),
)
# What an attention may hold besides: biases of its scores, norms of queries and keys, and diffusers' fused projections
# and processors.
SCORES_ONLY = ("relative_attention_bias", "rotary_emb", "q_norm", "k_norm", "norm_q", "norm_k", "norm_cross")
DIFFUSERS_ONLY = ("to_qkv", "to_kv", "processor")


class ProjectionSite(Site):
    """An attention or MLP that takes hidden states [..., D] first and returns the projected ones, alone or in a tuple.

    Attributes:
        projections: of `ATTENTIONS` and `MLPS`, those that can become such a site.
    """

    projections: tuple

    @classmethod
    def candidates(cls, model):
        return {name: module for name, module in model.named_modules() if _names(module, cls.projections)}

    @classmethod
    def neighbor(cls, module):
        return module.get_submodule(_names(module, cls.projections)[-1])

    @classmethod
    def check(cls, module):
        names = _names(module, cls.projections)
        for problem in (_signature_problem(module), _width_problem(module, names), _last_step_problem(module, names)):
            if problem:
                raise ValueError(problem)

    def forward(self, hidden_states, *arguments, **named):
        output = super().forward(hidden_states, *arguments, **named)
        if isinstance(output, tuple):
            return self.changed(hidden_states, output[0]), *output[1:]
        return self.changed(hidden_states, output)

    def changed(self, x, y):
        """The module's new output from its input x and its own output y, all [..., D]."""
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


def _last_step_problem(module, names):
    behind = _what_may_come_behind(module, names)
    return f"{names[-1]} must be its last step, but {behind} may come behind" if behind else None


def _what_may_come_behind(module, names):
    """In words; an empty string for nothing. Dropout inside an MLP changes nothing for the layers that go there."""
    known = (*names, *SCORES_ONLY, *DIFFUSERS_ONLY)
    others = {
        name: inner
        for name, inner in module.named_modules()
        if not any(f"{name}.".startswith(f"{part}.") for part in known)
    }
    suspects = [f"{name}.{own}".lstrip(".") for name, inner in others.items() for own in inner._parameters]
    if names in ATTENTIONS:
        suspects += [f"the dropout {name}" for name, inner in others.items() if _drops(inner)]
    if getattr(module, "residual_connection", False):
        suspects.append("a residual")
    if getattr(module, "rescale_output_factor", 1) != 1:
        suspects.append("a factor")
    return ", ".join(suspects)


def _drops(module):
    return isinstance(module, nn.Dropout) and module.p > 0
