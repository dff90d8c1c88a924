"""The command line: petl-ext, or python -m petl_ext."""

import argparse
import importlib.util
import json
import platform
import sys
from importlib import metadata

import torch

import petl_ext
from petl_ext.ops import hopper
from petl_ext.ops.backends import BACKENDS, NATIVE, VARIABLE, choices
from petl_ext.ops.kernels import OPS, held_kernels
from petl_ext.ops.preferred import PREFERENCES
from petl_ext.recipes import commands as recipe_commands

OPTIONAL_PACKAGES = ("transformers", "peft", "diffusers", "triton", "cupy")
# Modules, and the packages that bring them.
DEMO_PACKAGES = {
    "transformers": "transformers",
    "accelerate": "accelerate",
    "PIL": "Pillow",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}
LORA_PACKAGES = {"peft": "peft"}  # of the demos that have LoRA beside them
SEARCHES = ("das", "placement", "recipe")
DAS_OUTPUT = (
    "Prints one line of JSON: what DASConfig(skip=...) takes, and the share of the bare backbone's "
    "multiply-accumulates that remains. Writes search.json, which DepthSearch.load reads, and gates.png."
)
PLACEMENT_OUTPUT = (
    "Prints one line of JSON: what DVPBert(insert_layer=...) takes. Writes search.json, which "
    "PlacementSearch.load reads, and placement.png."
)


def _require(packages):
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"petl-ext: {', '.join(missing)} must be installed: pip install {' '.join(missing)}")


def _require_language_model():
    from petl_ext.demo.dvp.models import language_model_folder

    try:
        language_model_folder()
    except (ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"petl-ext: {error}") from error


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels(op):
    """ "CPU, CUDA": the devices for which there are kernels of `op`, each with whose they are if not petl_ext._C's."""
    held = [(device.upper(), "" if backend == NATIVE else f" ({backend})") for backend, device in held_kernels(op)]
    return ", ".join(device + whose for device, whose in held) or "no device"


def _cuda_state():
    if not any((NATIVE, "cuda") in held_kernels(op) for op in OPS):
        return "none in this build (installed beside a CUDA build of torch, or with PETL_CUDA=1, it has them)"
    return "built" if torch.ops.petl_ext.has_cuda_stream() else "built, but this torch has no CUDA"


def info():
    """What is installed, what the compiled part holds, and where it runs, one fact per line."""
    lines = [
        f"petl_ext {petl_ext.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        *(f"{package} {_version(package)}" for package in OPTIONAL_PACKAGES),
        *(f"kernels: {op} on {_kernels(op)}" for op in OPS),
        f"backend: {petl_ext.ops.backend()} of {' '.join(choices())} ({VARIABLE} chooses)",
        *(f"backend {backend.name}: {backend.missing}" for backend in BACKENDS.values() if backend.missing),
        *(f"auto prefers {preference.in_words()}" for preference in PREFERENCES),
        f"CUDA kernels: {_cuda_state()}",
        f"Hopper path: {hopper.state_in_words()}",
        f"CPU path: {petl_ext.ops.cpu_path()} of {torch.ops.petl_ext.cpu_paths()} (PETL_CPU_PATH chooses), "
        f"{torch.get_num_threads()} threads",
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "\n".join([*lines, f"GPUs: {', '.join(gpus) or 'none'}"])


def _run_info(_):
    try:
        print(info())
    except (RuntimeError, ValueError) as error:  # PETL_CPU_PATH or PETL_BACKEND names what is not there
        _exit(2, error)


def _run_demo(options):
    common = {"seed": options.seed, "progress": not options.no_progress}
    if options.method != "dvp" and (options.digits or options.language_model):
        _exit(2, "--digits and --language-model are of demo dvp")
    if options.method is not None:
        {"dvp": _run_dvp_demo, "llama": _run_llama_demo, "digits": _write_digits}[options.method](options, common)
        return
    from petl_ext.demo.vilt.run import run_demo, tune

    print(tune(options.output, **common) if options.tune else run_demo(options.output, options.quick, **common))


def _run_dvp_demo(options, common):
    if options.digits:
        _run_dvp_on_digits(options, common)
        return
    _require(LORA_PACKAGES)
    from petl_ext.demo.easy_vqa import run

    named = {**common, "language_model": options.language_model or "minilm"}
    _checked(run.check_packages, named["language_model"])
    try:
        print(
            run.tune(options.output, **named)
            if options.tune
            else run.run_easy_vqa_demo(options.output, options.quick, **named)
        )
    except OSError as error:
        _exit(2, error)


def _checked(check, *arguments):
    """Ends where packages are missing or hold other files than known, or memory is too small."""
    try:
        check(*arguments)
    except (ModuleNotFoundError, ValueError, MemoryError) as error:
        _exit(2, error)


def _run_dvp_on_digits(options, common):
    if options.tune or options.language_model:
        _exit(2, "demo dvp --digits has neither --tune nor --language-model")
    _require_language_model()
    from petl_ext.demo.dvp.run import run_dvp_demo

    try:
        print(run_dvp_demo(options.output, options.quick, **common))
    except OSError as error:
        _exit(2, error)


def _run_llama_demo(options, common):
    if options.tune:
        _exit(2, "demo llama has no --tune")
    _require(LORA_PACKAGES)
    from petl_ext.demo.llama import run

    _checked(run.check)
    try:
        print(run.run_llama_demo(options.output, options.quick, **common))
    except OSError as error:
        _exit(2, error)


def _write_digits(options, common):
    if options.tune:
        _exit(2, "demo digits has no --tune")
    from petl_ext.demo.digits.for_recipes import write_for_recipes

    try:
        print(write_for_recipes(options.output, options.quick, **common))
    except OSError as error:
        _exit(2, error)


def _run_depth_search(options):
    from petl_ext.demo.vilt.depth_search import DigitsDepthSearch

    given = {"num_skip": options.num_skip, "max_macs": options.max_macs}
    goal = {name: value for name, value in given.items() if value is not None} or {"num_skip": 1}
    _run_search(options, DigitsDepthSearch, goal)


def _run_placement_search(options):
    _require_language_model()
    from petl_ext.demo.dvp.placement_search import DigitsPlacementSearch

    _run_search(options, DigitsPlacementSearch, {}, tasks=("VQA",))


def _run_search(options, search_class, goal, **reading):
    run_class = search_class.run_class
    size = run_class.size_of(options.quick, options.steps)
    try:
        checkpoint = search_class.check(options.output, size, options.seed, goal, options.resume)
        run = run_class.prepare(options.output, size, options.seed, not options.no_progress, **reading)
        search = search_class.prepare(run, goal, checkpoint)
    except (ValueError, OSError) as error:
        _exit(2, error)
    if options.resume and search.checkpoint is None:
        print(f"petl-ext: no interrupted search in {options.output}; begins anew", file=sys.stderr)
    search.train()
    print(json.dumps(search.result()))


def _exit(status, message):
    print(f"petl-ext: {message}", file=sys.stderr)
    raise SystemExit(status)


def _parser():
    parser = argparse.ArgumentParser(prog="petl-ext", description=petl_ext.__doc__)
    parser.set_defaults(packages={}, after_interrupt="")
    commands = parser.add_subparsers(required=True, metavar="{info,demo,recipes,train,search,eval,compare}")
    commands.add_parser("info", help="versions, kernels, CPU path, GPUs").set_defaults(run=_run_info)
    _add_demo(commands)
    recipe_commands.add_commands(commands)
    _add_searches(commands)
    return parser


def _add_demo(commands):
    demo = commands.add_parser("demo", help="fine-tune a small ViLT on pictures of handwritten digits, by each method")
    demo.add_argument(
        "method",
        nargs="?",
        choices=["dvp", "llama", "digits"],
        help="instead, on weights that others trained: MiniLM answers questions about what EfficientNet sees, through "
        "dynamic visual prompts; or APT, adapters and DAS in SmolLM2, a LLaMA; or only write the data of the digits "
        "recipes, in the official format of every task, and a small ViLT that knows their words",
    )
    demo.add_argument("--digits", action="store_true", help="of dvp: about the digits, which the small ViLT sees")
    demo.add_argument("--language-model", choices=["minilm", "smollm2"], help="of dvp (default: minilm)")
    demo.add_argument("--tune", action="store_true", help="instead, compare learning rates on the validation split")
    _add_digits_options(demo, "folder for data, report and charts")
    demo.set_defaults(run=_run_demo, packages=DEMO_PACKAGES)


def _add_searches(commands):
    search = commands.add_parser(
        "search", help="choose what of a model a task needs: of a RECIPE, or the demo's; alone, lists the searches"
    )
    search.set_defaults(run=lambda _: search.print_help())
    searches = search.add_subparsers(title="what can be searched", metavar="SEARCH")
    _add_depth_search(searches)
    _add_placement_search(searches)
    recipe_commands.add_search(searches)


def _with_recipe(arguments):
    """`search RECIPE` is `search recipe RECIPE`."""
    is_search = len(arguments) > 1 and arguments[0] == "search" and not arguments[1].startswith("-")
    return ["search", "recipe", *arguments[1:]] if is_search and arguments[1] not in SEARCHES else arguments


def _add_depth_search(searches):
    summary = "the layers of the demo's ViLT that its task does not need: dynamic architecture skipping"
    das = searches.add_parser("das", help=summary, description=f"Finds {summary}. {DAS_OUTPUT}")
    goal = das.add_mutually_exclusive_group()
    goal.add_argument("--num-skip", type=int, metavar="N", help="layers to skip (default: 1)")
    goal.add_argument("--max-macs", type=float, metavar="F", help="instead, the share of the bare MACs that may remain")
    _add_search_options(das, _run_depth_search)


def _add_placement_search(searches):
    summary = "the layer of MiniLM at which the demo's visual prompt enters best: KAB-APP of dynamic visual prompting"
    placement = searches.add_parser("placement", help=summary, description=f"Finds {summary}. {PLACEMENT_OUTPUT}")
    _add_search_options(placement, _run_placement_search)


def _add_search_options(parser, run):
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: as the demo's search has)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    _add_digits_options(parser, "folder for data, checkpoints and results")
    hint = "; the same command with --resume goes on from the last checkpoint"
    parser.set_defaults(run=run, packages=DEMO_PACKAGES, after_interrupt=hint)


def _add_digits_options(parser, output):
    parser.add_argument("--output", default="demo_out", help=f"{output} (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few steps on little data, to see it run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true", help="without progress bars")


def main(arguments=None):
    options = _parser().parse_args(_with_recipe(sys.argv[1:] if arguments is None else list(arguments)))
    _require(options.packages)
    try:
        options.run(options)
    except KeyboardInterrupt:
        _exit(130, f"interrupted{options.after_interrupt}")


if __name__ == "__main__":
    main()
