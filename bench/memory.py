"""What autograd keeps between forward and backward."""

import torch


def saved_for_backward(call, given):
    """Bytes of each storage that autograd keeps of a call, those of the tensors in `given` left out.

    Args:
        call: function without arguments; its result holds the graph.
    """
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # itself, it would hold the node that keeps it, and neither would ever be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result holds the graph, and the graph what it saved: no address is used twice meanwhile.
        out = call()
    for tensor in given:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    del out
    return list(saved.values())
