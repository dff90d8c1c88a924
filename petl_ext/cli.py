"""The command line: petl-ext, or python -m petl_ext."""

import argparse
import importlib.util
import platform
from importlib import metadata

import torch

import petl_ext

OPTIONAL_PACKAGES = ("transformers", "peft", "diffusers", "triton", "cupy")


DEMO_MODULES = ("transformers", "accelerate", "PIL", "sklearn", "matplotlib", "tqdm")


def _require(modules, extra):
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"petl-ext: {', '.join(missing)} is not installed; pip install 'petl_ext[{extra}]' brings it")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernel_devices(op):
    """The devices for which petl_ext._C holds kernels of `op`."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [device for device in ("CPU", "CUDA") if has_kernel(f"petl_ext::{op}_forward", device)]


def _cuda_state():
    if "CUDA" not in _kernel_devices("apt"):
        return "none in this build (installed beside a CUDA build of torch, or with PETL_CUDA=1, it has them)"
    return "built" if torch.ops.petl_ext.has_cuda_stream() else "built, but this torch has no CUDA"


def info():
    """What is installed, what the compiled part holds, and where it runs, one fact per line."""
    lines = [
        f"petl_ext {petl_ext.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        *(f"{package} {_version(package)}" for package in OPTIONAL_PACKAGES),
        *(f"kernels: {op} on {', '.join(_kernel_devices(op))}" for op in ("apt", "adapter")),
        f"CUDA kernels: {_cuda_state()}",
        f"CPU path: {petl_ext.ops.cpu_path()} of {torch.ops.petl_ext.cpu_paths()} (PETL_CPU_PATH chooses), "
        f"{torch.get_num_threads()} threads",
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "\n".join([*lines, f"GPUs: {', '.join(gpus) or 'none'}"])


def _parser():
    parser = argparse.ArgumentParser(prog="petl-ext", description=petl_ext.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, kernels, CPU path, GPUs")
    demo = commands.add_parser("demo", help="fine-tune a small ViLT on pictures of handwritten digits, by each method")
    demo.add_argument("--output", default="demo_out", help="folder for data, report and charts (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="fewer steps: a minute, and lower accuracies")
    demo.add_argument("--tune", action="store_true", help="instead, compare learning rates on the validation split")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--no-progress", action="store_true", help="without progress bars")
    return parser


def main(arguments=None):
    options = _parser().parse_args(arguments)
    if options.command == "info":
        print(info())
        return
    _require(DEMO_MODULES, "demo")
    from petl_ext.demo import run_demo, tune

    common = {"seed": options.seed, "progress": not options.no_progress}
    print(tune(options.output, **common) if options.tune else run_demo(options.output, options.quick, **common))


if __name__ == "__main__":
    main()
