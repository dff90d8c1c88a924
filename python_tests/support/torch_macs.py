"""What torch counts itself, beside which petl_ext.counting is held."""

from torch.utils.flop_counter import FlopCounterMode

from petl_ext import counting


def counted_macs(compute):
    counting.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() // 2
