"""The ops on CuPy arrays: `petl_ext.cupy.apt(x, y, prompts, keys, log_scale)`, with an array as the result.

They are the functions of `petl_ext.ops`, which take arrays of any DLPack library; these take CuPy's alone. Nothing is
copied, and the kernels join CuPy's current stream. CuPy has no bfloat16; it must be installed beside a CUDA build of
torch: pip install 'petl_ext[cupy]'.
"""

import functools

from petl_ext import ops


def _of_cupy(op):
    @functools.wraps(op)
    def call(*arguments, **named):
        import cupy

        first = arguments[0] if arguments else next(iter(named.values()), None)
        if not isinstance(first, cupy.ndarray):
            raise TypeError(
                f"petl_ext.cupy.{op.__name__}: the first argument must be a cupy.ndarray, got {type(first).__name__}; "
                f"petl_ext.ops.{op.__name__} takes tensors and arrays of other libraries"
            )
        return op(*arguments, **named)

    return call


adapter, apt, attention_pool = _of_cupy(ops.adapter), _of_cupy(ops.apt), _of_cupy(ops.attention_pool)
