"""Bottlenecks of the library `adapters` (arXiv 2311.11077), 1.3.0, and of adapter-transformers before it: Adapter and
ParallelAdapter.

They go by their names, unlike other bottlenecks, since they return their hidden units, which nothing in the library
reads.
"""

import inspect

from torch import nn

from petl_ext.ops.adapter import adapter
from petl_ext.patching.activation import activation_of, refuse_activation
from petl_ext.patching.dispatch import own_forward_because
from petl_ext.patching.kind import (
    Kind,
    Settings,
    as_gain,
    bias_of,
    described,
    names_in,
    norm_arguments,
    promoted,
    refuse_bottleneck,
    refuse_dropout,
    refuse_names,
    refuse_scale,
    weight_of,
)


class LibraryAdapter(Kind):
    """up = scaling * adapter_up(adapter_down(x)), to which a sequential adapter adds the residual."""

    petl_name = "bottleneck of adapters"
    petl_op = "adapter"
    petl_published = (
        "Adapter and ParallelAdapter of the library adapters and of adapter-transformers (adapter_down, adapter_up, "
        "non_linearity)"
    )

    def forward(self, x, residual_input, *gating, **named_gating):
        # Without a gate there is none to return, whatever is asked for.
        if own_forward_because(self, x):
            return super().forward(x, residual_input, *gating, **named_gating)
        return self.petl_compute(self, x, residual_input)

    @classmethod
    def petl_takes(cls, forward):
        """adapter-transformers 2 knows no `output_gating`."""
        names = list(inspect.signature(forward).parameters)[1:]
        return names in (["x", "residual_input"], ["x", "residual_input", "output_gating"])

    @classmethod
    def petl_arguments(cls):
        return "(self, x, residual_input), perhaps with output_gating"

    @staticmethod
    def petl_looks_like(module):
        return {"adapter_down", "adapter_up", "non_linearity"} <= names_in(module)

    @staticmethod
    def petl_refusal(module):
        if "gate" in names_in(module):
            return "it has a gate"
        if "adapter_norm_after" in names_in(module):
            return f"it ends in {described(module.adapter_norm_after)}"
        norm = ("adapter_norm_before",) if getattr(module, "add_layer_norm_before", False) else ()
        names = ("adapter_down", "adapter_up", "non_linearity", *norm)
        if reason := refuse_names(module, names, ("scaling", "dropout")):
            return reason
        layers = list(module.adapter_down) if type(module.adapter_down) is nn.Sequential else []
        if len(layers) != 2 + len(norm) or layers[-1] is not module.non_linearity:
            return f"adapter_down is {described(module.adapter_down)}, not Sequential([LayerNorm,] Linear, activation)"
        return (
            refuse_bottleneck(layers[-2], module.adapter_up, layers[0] if norm else None)
            or refuse_activation(module.non_linearity)
            or refuse_scale(getattr(module, "scaling", None))
            or refuse_dropout(getattr(module, "dropout", None) or nn.Dropout(0.0))
        )

    @staticmethod
    def petl_candidates(module):
        # Adapter and ParallelAdapter hold the same; only their forward tells whether the residual is added there.
        activation = activation_of(module.non_linearity)
        return [Settings(activation, adds_residual) for adds_residual in (True, False)]

    @staticmethod
    def petl_examples(module, draw, *size):
        width = module.adapter_up.out_features
        return [(draw(*size, width), draw(*size, width))]

    @staticmethod
    def petl_compute(module, x, residual_input):
        """(output, None, up): nothing in the library reads the hidden units, and up serves AdapterFusion."""
        *norm, down, _ = module.adapter_down
        up = adapter(
            x,
            weight_of(down),
            bias_of(down),
            weight_of(module.adapter_up),
            bias_of(module.adapter_up),
            as_gain(module.scaling),
            module.petl_settings.activation,
            **norm_arguments(*norm or (None,), like=down.weight),
        )
        up = promoted(up, module.scaling)
        return up + residual_input if module.petl_settings.adds_residual else up, None, up

    @staticmethod
    def petl_sizes(module):
        return module.adapter_up.out_features, module.adapter_up.in_features
