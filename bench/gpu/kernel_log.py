"""What ran on the GPU, by torch's profiler."""

import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


def kernels_of(run):
    """[(name, microseconds)] of every kernel, copy and fill that `run` puts into the queue, in order.

    Call it once before it counts: the first session may miss what runs while the profiler starts.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as session:
        run()
        torch.cuda.synchronize()
    # Only the trace tells work on the device from what the profiler itself did there.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        session.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    on_device = [event for event in events if event.get("cat") in CATEGORIES]
    return [(event["name"], float(event["dur"])) for event in sorted(on_device, key=lambda event: float(event["ts"]))]
