"""What a model costs: its parameters, and the multiply-accumulates (MACs) of a forward pass, counted while it runs.

The formulas of single layers lie beside these, as `apt_macs` in nn/apt.py. They count as the papers do: the MACs of the
added branch alone, for one sequence of `tokens` rows and a batch of one. What does not depend on the input, such as
APT's keys, is computed once per batch and shared by the whole of it.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from petl_ext.printing import listed


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters that require gradients, all parameters) of `model`, shared ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one forward pass, the whole batch's. Prints as a table.

    Attributes:
        by_module: {dotted name: MACs inside the module, its children included, over all its calls}; "" is the model.
            A module that has several names has the same MACs under each. One whose own forward is never called, such
            as a list, or a model that runs by another method, has the sum of its children's: what it multiplies without
            them counts in the modules around it alone.
    """

    by_module: dict

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.by_module[""]

    def of(self, name: str) -> int:
        """Inside the module of that dotted name, its children included; 0 where it did not run.

        Raises:
            ValueError: the model has no such module.
        """
        if name not in self.by_module:
            raise ValueError(f"MacCount: the model has no module {name!r}; {self._beside(name)}")
        return self.by_module[name]

    def table(self, depth: int = 2) -> str:
        """Modules whose names have at most `depth` parts, without those that multiply nothing."""
        macs = {name: macs for name, macs in self.by_module.items() if macs and name and name.count(".") < depth}
        cells = [("module", "MACs", "share")]
        cells += [(name, f"{macs:,}", f"{macs / self.total:.1%}") for name, macs in macs.items()]
        cells += [("total", f"{self.total:,}", "")]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            f"{name:{widths[0]}}  {macs:>{widths[1]}}  {share:>{widths[2]}}".rstrip() for name, macs, share in cells
        )

    def __str__(self):
        return self.table()

    def _beside(self, name):
        """The children of the last module on the way to `name` that is there."""
        while name not in self.by_module:
            name = name.rpartition(".")[0]
        children = [other for other in self.by_module if other and other.rpartition(".")[0] == name]
        return f"{name or 'it'} has {listed(children, none='no children')}"


def count_macs(model: nn.Module, inputs: Any) -> MacCount:
    """Multiply-accumulates of one forward pass of `model` in eval mode, without gradients.

    Counted are matrix products, convolutions and attention, padding and masked positions included, as torch's flop
    counter has them (element-wise arithmetic, LayerNorm and softmax count nothing), and what petl_ext's kernels
    multiply. Not seen: nn.LSTM on the CPU, quantized layers, and kernels of other libraries. Afterwards the model is as
    it was: training flags, hooks and the states of torch's random number generators.

    Args:
        model: any nn.Module, on the meta device too, where nothing is computed and no memory is needed.
        inputs: what forward takes: a dict of keyword arguments, a tuple or list of positional ones, or one tensor.

    Returns:
        A `MacCount`.

    Raises:
        TypeError: inputs are none of these.
    """
    from torch.utils.flop_counter import FlopCounterMode

    positional, named = _arguments(inputs)
    register_flop_formulas()
    counter = FlopCounterMode(display=False, custom_mapping=_formulas_for_torch())
    with _left_as_it_was(model), counter, _flops_by_module(model, counter) as flops:
        model(*positional, **named)

    def macs_inside(module):
        if flops[module] is None:
            return sum(map(macs_inside, module.children()))
        return flops[module] // 2

    return MacCount({name: macs_inside(module) for name, module in model.named_modules(remove_duplicate=False)})


_FORMULAS = {}


def add_flop_formula(op: Callable, formula: Callable) -> None:
    """Notes what the op of torch.ops computes, for `register_flop_formulas`.

    Args:
        formula: from the op's arguments, tensors as their shapes, its FLOPs.
    """
    _FORMULAS[op] = formula


def register_flop_formulas() -> None:
    """Teaches torch.utils.flop_counter what petl_ext's kernels multiply; `count_macs` does it by itself.

    Call it before you make a FlopCounterMode. The formulas count the matrix products that the kernels compute, at 2
    FLOPs per multiply-accumulate; what only refines a product's rounding is not counted.
    """
    # Not on import of petl_ext: it is torch's part that imports Triton.
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op, formula in _FORMULAS.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


def _formulas_for_torch():
    """For this count alone: torch's counter passes over some of torch's ops in silence, and that of torch 2.11 raises
    at fused attention in which several query heads share a key."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention: _attention_flops,
        aten._scaled_dot_product_efficient_attention: _attention_flops,
        aten._scaled_dot_product_cudnn_attention: _attention_flops,
        aten.mv: lambda matrix, vector, **_: 2 * prod(matrix),
        aten.addmv: lambda added, matrix, vector, **_: 2 * prod(matrix),
        aten.dot: lambda left, right, **_: 2 * prod(left),
    }


def _attention_flops(query, key, value, *_, **__):
    """query key^T and weights value for every query head; a causal mask saves nothing, as in torch's formulas."""
    *heads, queries, width = query
    return 2 * prod(heads) * queries * key[-2] * (width + value[-1])


def _arguments(inputs):
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, tuple | list):
        return inputs, {}
    raise TypeError(f"count_macs: inputs must be a tensor, a tuple, a list or a dict, got {type(inputs).__name__}")


@contextmanager
def _left_as_it_was(model):
    training = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    cuda = [device for device in devices if device.type == "cuda"]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # nn.MultiheadAttention's fast path is one op, of which the counter sees nothing.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(cuda, device_type="cuda"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _flops_by_module(model, counter):
    """{module: what `counter` counts between its entry and its exit, or None without one}, filled inside the `with`.

    The counter itself goes by the names of classes and children, of which a shared module has several.
    """
    flops = dict.fromkeys(model.modules())
    running = {}  # module: (calls that have not returned, what the counter showed before the first)

    def enter(module, _):
        if module in flops:
            calls, before = running.get(module, (0, counter.get_total_flops()))
            running[module] = calls + 1, before

    def leave(module, *_):
        if module in running:
            calls, before = running.pop(module)
            if calls > 1:
                running[module] = calls - 1, before
            else:
                flops[module] = (flops[module] or 0) + counter.get_total_flops() - before

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield flops
    finally:
        for hook in hooks:
            hook.remove()
