"""A list of layers may hold several sorts of them, such as attentions and linear attentions: a pattern that names what
only one sort has would leave the others out without a word."""

from torch import nn

from petl_ext.attaching.sites.site import candidates_of
from petl_ext.printing import listed


def check_takes_whole_stacks(model, config, family, wanted, chosen):
    """Raises a ValueError if a pattern takes a layer of a stack, would take the same of its others, and these have it
    under another name or as something that can carry no layer.

    A pattern that names the indices of layers takes only these, and is left alone.

    Args:
        wanted: a list of `Wanted`.
        chosen: the dotted names that they take in the model.
    """

    def asked(name):
        return any(each.takes(name, family) for each in wanted)

    for stack, layers in _outermost_stacks(model).items():
        by_index = _by_index(stack, chosen)
        parts = sorted({part for found in by_index.values() for part in found})
        for index, layer in layers.items() if by_index else ():
            missing = [
                part for part in parts if part not in by_index.get(index, ()) and asked(_name(stack, index, part))
            ]
            there = [part for part in missing if _has(layer, part)]
            if there:
                raise ValueError(
                    f"attach: {_name(stack, index, there[0])} can carry no layer of {type(config).__name__}, but other "
                    f"layers of {stack} get one there; leave it out, or name the indices of those that are to have one"
                )
            if missing and index not in by_index:
                _check_holds_none(stack, index, candidates_of(model, config.site_classes_in(family)), missing[0])


def _check_holds_none(stack, index, candidates, part):
    left = [name for name in candidates if name.startswith(f"{stack}.{index}.")]
    if left:
        others = "|".join([part, *(name.removeprefix(f"{stack}.{index}.") for name in left)])
        raise ValueError(
            f"attach: layer {index} of {stack} has no {part}, where other layers get one, but {listed(left)}. Name all "
            rf'sorts, sites=[r"{stack.rpartition(".")[2]}\.\d+\.({others})"], or the indices of the layers that are to '
            "have one"
        )


def _outermost_stacks(model):
    """{dotted name: {index: layer}} of the lists of layers that lie in no other."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {}
    for name, module in found.items():
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = dict(module.named_children())
    return outermost


def _by_index(stack, chosen):
    """{index: what of the layer is chosen}, by its dotted names inside the layer, "" for the layer itself."""
    found = {}
    for name in chosen:
        if name.startswith(f"{stack}."):
            index, _, part = name.removeprefix(f"{stack}.").partition(".")
            found.setdefault(index, set()).add(part)
    return found


def _name(stack, index, part):
    return f"{stack}.{index}.{part}".removesuffix(".")


def _has(layer, part):
    for child in filter(None, part.split(".")):
        layer = layer._modules.get(child)
        if layer is None:
            return False
    return True
