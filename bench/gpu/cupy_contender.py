"""What a page of CuPy does: two products and one fused elementwise kernel, against ours on the same CuPy arrays.

CuPy has no bfloat16, so float16 and float32. Where there is no CuPy or no driver the record says why it was left out.
"""

import sys

import torch
from clock import cuda_clock, race, speed_up
from problems import ADAPTER, APT, draw_rows

import petl_ext
from gpu.step_log import record

ROWS, WIDTH, ROUNDS, CALLS = 15360, 768, 15, 10
DTYPES = (torch.float16, torch.float32)


def obstacle():
    """Why it cannot run here, "" where it can."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def of_apt(cupy):
    add = cupy.ElementwiseKernel(
        "T y, T told, T gate, float32 log_scale",
        "T out",
        "out = exp(log_scale) * (float(y) + float(gate) * float(told))",
    )

    def run(x, y, prompts, keys, log_scale):
        scores = cupy.maximum(x @ keys.T, 0)
        return add(y, scores @ prompts, scores.max(1, keepdims=True), log_scale.astype(cupy.float32))

    return run


def of_adapter(cupy):
    """The sequential one, without a norm."""
    add = cupy.ElementwiseKernel("T x, T added, T bias", "T out", "out = float(x) + float(added) + float(bias)")

    def run(x, down, down_bias, up, up_bias):
        return add(x, cupy.maximum(x @ down.T + down_bias, 0) @ up.T, up_bias)

    return run


def cases(cupy):
    """(op, inner, ours, CuPy's) of functions with the same arguments."""
    for inner in APT.sizes:
        yield APT, inner, petl_ext.cupy.apt, of_apt(cupy)

    def ours(x, *weights):
        return petl_ext.cupy.adapter(x, *weights, residual=x)

    for inner in ADAPTER.sizes:
        yield ADAPTER, inner, ours, of_adapter(cupy)


def arrays_of(cupy, op, inner, dtype):
    problem = draw_rows(op, ROWS, WIDTH, inner, dtype, device="cuda")
    names = ("x", "y", "prompts", "keys", "log_scale") if op is APT else ("x", "down", "down_bias", "up", "up_bias")
    return [cupy.from_dlpack(problem[name].detach()) for name in names]


def compare(cupy, op, inner, dtype, ours, theirs):
    arrays = arrays_of(cupy, op, inner, dtype)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def repeat(function):
        def run():
            with stream:  # that of the clock
                for _ in range(CALLS):
                    function(*arrays)

        return run

    seconds = race({"ours": repeat(ours), "cupy": repeat(theirs)}, ROUNDS, cuda_clock)
    difference = float(cupy.abs(ours(*arrays).astype(cupy.float32) - theirs(*arrays).astype(cupy.float32)).max())
    ratio = speed_up(seconds, "cupy", "ours")
    name = f"{op} {op.inner}={inner} {str(dtype).removeprefix('torch.')}"
    record("cupy", name=name, greatest_difference=difference, speed_up={"vs cupy": ratio})
    return f"{name} {ratio['median']:.2f}"


def main():
    if reason := obstacle():
        record("summary", text=f"left out: {reason}")
        return 0
    import cupy

    told = [compare(cupy, op, inner, dtype, *pair) for dtype in DTYPES for op, inner, *pair in cases(cupy)]
    record("summary", text=f"times as fast as CuPy: {', '.join(told)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
