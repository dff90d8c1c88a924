"""What the common tests (test_every_op.py) need to know of an op beside what is in the table of bench/problems.py."""

from collections.abc import Callable
from dataclasses import dataclass, field

import problems
import torch
from problems import draw
from tolerance import assert_as_good_as_torch

TILE = 96  # rows per tile on the widest CPU path
CUDA_TILE = 128  # and of the largest block of threads
POOL_TILE, POOL_SPLIT = 64, 128  # tokens that are taken at a time, and that one thread takes at most on the CPU
CUDA_POOL_PART = 80  # and that one block of threads takes at most

# Of [60, 64], each with the same elements.
ROW_LAYOUTS = {
    "leading axes": lambda t: t.view(3, 4, 5, 64),
    "row stride": lambda t: torch.cat([t, t], 1)[:, :64],
    "transposed": lambda t: t.mT.contiguous().mT,
    "permuted": lambda t: t.view(6, 10, 64).permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "not aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(60, 64),
}
# Of three axes.
SAMPLE_LAYOUTS = {
    "without the first": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "part of the width": lambda t: torch.cat([t, t], 2)[..., :64],
    "samples second": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.mT.contiguous().mT,
    "not aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def assert_equal(results, expected):
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def check(device, problem):
    """Dtypes of the output and all gradients, and values by the one tolerance rule."""
    op, problem = problem.op, problem.to(device.torch_device)
    oracle, theirs = problem.double().run(op.reference), problem.run(op.reference)
    for name, result in problem.run(op.ours).items():
        expected = problem.tensors[op.out_like if name == "out" else name[1:]].dtype
        assert result.dtype == expected, f"{name} has dtype {result.dtype}, expected {expected}"
        if name not in TESTED[op.name].by_luck:
            assert_as_good_as_torch(name, result, theirs[name], oracle[name])


def check_together(device, problems, names=None):
    """Values by the one tolerance rule, of several problems as if they were one: for what has its largest error by
    luck, being of few numbers, or of a value so near to zero that rounding decides whether ReLU lets it through.

    Args:
        names: of the results; all where it is None.
    """
    problems = [problem.to(device.torch_device) for problem in problems]
    op = problems[0].op

    def results(problems, function):
        runs = [problem.run(function) for problem in problems]
        return {name: torch.cat([run[name] for run in runs]) for name in names or runs[0]}

    oracle = results([problem.double() for problem in problems], op.reference)
    theirs, ours = results(problems, op.reference), results(problems, op.ours)
    for name, result in ours.items():
        assert_as_good_as_torch(name, result, theirs[name], oracle[name])


def narrower(name):
    """A change of a problem: the tensor `name` without the last of its last axis."""
    return lambda problem: problem.change(**{name: problem[name][..., :-1]})


def twice(name):
    """A change of a problem: the tensor `name` twice along its first axis."""
    return lambda problem: problem.change(**{name: torch.cat([problem[name]] * 2)})


def _raw_apt(problem):
    return *problem.tensors.values(), problem["activation"], True


def _raw_apt_backward(problem):
    x, y, *weights = problem.tensors.values()
    _, *saved = torch.ops.petl_ext.apt_forward(*_raw_apt(problem))
    for optional_y, needs in ((y, (True,) * 4), (None, (False, True, False, True))):
        yield problem.dout, x, optional_y, *weights, *saved, problem["activation"], *needs


def _adapter_weights(problem):
    names = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias", "scale")
    options = problem.options
    return *map(problem.tensors.get, names), options.get("scale", 1.0), 1e-5, options["activation"]


def _raw_adapter(problem):
    x = problem["x"]
    return x, x if problem.same else problem.tensors.get("residual"), *_adapter_weights(problem)


def _raw_adapter_backward(problem):
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        yield problem.dout, problem["x"], *_adapter_weights(problem), bool(problem.same), *needs


def _raw_attention_pool(problem):
    return *problem.tensors.values(), *problem.options.values()


def _raw_attention_pool_backward(problem):
    *tensors, scale = _raw_attention_pool(problem)
    saved = torch.ops.petl_ext.attention_pool_forward(*tensors, scale)
    for needs in ((True, True), (False, True), (True, False)):
        yield problem.dout, *tensors, *saved, scale, *needs


@dataclass(frozen=True)
class Tested:
    """An op's data for the common tests.

    Attributes:
        usual: names of the forms that stand for the others; the last where one is enough.
        everything: the form with every argument that it may have.
        sizes: of problems; a dict, each with the activation there or None.
        odd_sizes: with a width that is no multiple of eight, which a CPU takes.
        small: sizes where they do not matter.
        other: others, which a graph compiled for the small ones takes too.
        mixed: sizes for tensors in several dtypes.
        several: sizes without the inner one, for problems that are solved at the same time.
        long: sizes of which threads and blocks have more than one part each.
        slabs: sizes with more rows than a slab of the weights' gradients, if it has slabs.
        ordered: sizes and dtypes, one for each shape of the CUDA kernels.
        unsupported: what CUDA says to sizes that it does not take.
        int_message: tensors to what is said when they are integers, where that is not the usual.
        wrong_for_kernels: what the kernels say to a change of a small problem in its form with every argument.
        wrong: what all say to one: the kernels, the reference, and torch.compile.
        raw: a problem's arguments of the raw op forward.
        raw_backward: of the raw op backward, several times: all gradients, then fewer.
        layouts: of the tensors in `laid_out` and of dout, at `laid_out_sizes`.
        rows_alone: whether a row without leading axes is a problem too.
        by_luck: results of one number; whose error of one number is smaller is luck.
    """

    op: problems.Op
    usual: tuple[str, ...]
    everything: dict
    sizes: dict
    odd_sizes: tuple
    small: tuple
    other: tuple
    mixed: tuple
    several: tuple
    long: tuple
    ordered: tuple
    unsupported: dict
    wrong_for_kernels: dict
    wrong: dict
    raw: Callable
    raw_backward: Callable
    layouts: dict
    laid_out: tuple[str, ...]
    laid_out_sizes: tuple
    slabs: tuple = ()
    int_message: dict = field(default_factory=dict)
    rows_alone: bool = False
    by_luck: tuple[str, ...] = ()

    def problem(self, *sizes, form=None, **options):
        """Of the small sizes and in the last of the usual forms if not given."""
        return draw(self.op, *(sizes or self.small), **self.op.forms[form or self.usual[-1]], **options)

    def wrong_problem(self, message):
        problem = draw(self.op, *self.small, **self.everything)
        return (self.wrong_for_kernels | self.wrong)[message](problem)

    def __str__(self):
        return self.op.name


_CUDA_WIDTHS = "width D must be a multiple of 8 up to 8192, got "
_OF_FOUR_SHAPES = ((50, torch.bfloat16), (200, torch.bfloat16), (300, torch.float16), (300, torch.float32))
_OF_FEW_ROWS = (37, 264, 90), torch.bfloat16
_OF_POOLING = ((12, torch.bfloat16), (40, torch.float16), (40, torch.float32))

APT = Tested(
    problems.APT,
    usual=("relu",),
    everything={},
    sizes=dict.fromkeys(
        [
            (1, 64, 1),
            (7, 64, 5),
            (TILE - 1, 768, 50),
            (TILE, 64, 16),
            (TILE + 1, 1024, 200),
            (CUDA_TILE - 1, 64, 129),
            (CUDA_TILE + 1, 72, 512),
            (3, 8192, 5),
            (1000, 768, 50),
        ]
    ),
    odd_sizes=((65, 770, 33),),
    small=(30, 64, 10),
    other=(47, 64, 10),
    mixed=(200, 768, 50),
    several=(300, 64),
    long=(5000, 64, 33),
    slabs=(4100, 64, 17),
    ordered=(*(((131, 136, num_prompts), dtype) for num_prompts, dtype in _OF_FOUR_SHAPES), _OF_FEW_ROWS),
    unsupported={
        f"{_CUDA_WIDTHS}770": (2, 770, 33),
        f"{_CUDA_WIDTHS}8200": (2, 8200, 3),
        "number of prompts P must be at most 512, got 513": (2, 64, 513),
    },
    wrong_for_kernels={
        r"x must have shape \[.*\].*, got \[30, 63\]": narrower("x"),
        # Narrower prompts set the width that the others are held against.
        r"x must have shape \[.*\].*, got \[30, 64\]": narrower("prompts"),
    },
    wrong={
        r"y must have shape \[30, 64\].*, got \[30, 63\]": narrower("y"),
        r"y must have shape \[60, 64\].*, got \[30, 64\]": twice("x"),
        r"keys must have shape \[10, 64\].*, got \[10, 63\]": narrower("keys"),
        r"log_scale must have shape \[1\].*, got \[2\]": twice("log_scale"),
        "activation must be relu or softmax, got gelu": lambda problem: problem.change(activation="gelu"),
    },
    raw=_raw_apt,
    raw_backward=_raw_apt_backward,
    layouts=ROW_LAYOUTS,
    laid_out=("x", "y"),
    laid_out_sizes=(60, 64, 10),
    rows_alone=True,
)
ADAPTER = Tested(
    problems.ADAPTER,
    usual=("sequential", "bypass"),
    everything={"norm": True, "gain": True, "residual": "another"},
    sizes={
        (1, 64, 1): "silu",
        (7, 64, 5): "relu",
        (TILE - 1, 768, 96): "relu",
        (TILE, 64, 16): "gelu",
        (TILE + 1, 1024, 200): "silu",
        (CUDA_TILE - 1, 64, 129): "silu",
        (CUDA_TILE + 1, 72, 512): "gelu",
        (1000, 768, 33): "gelu",
    },
    odd_sizes=((65, 770, 33), (65, 33, 33)),
    small=(30, 64, 10),
    other=(47, 64, 10),
    mixed=(200, 768, 50),
    several=(300, 64),
    long=(5000, 64, 33),
    slabs=(4100, 64, 17),
    ordered=(*(((131, 136, bottleneck), dtype) for bottleneck, dtype in _OF_FOUR_SHAPES), _OF_FEW_ROWS),
    unsupported={
        f"{_CUDA_WIDTHS}770": (2, 770, 33),
        f"{_CUDA_WIDTHS}8200": (2, 8200, 3),
        "bottleneck B must be at most 512, got 513": (2, 64, 513),
    },
    int_message={
        "residual": r"residual must (have the dtype of x|be float32, bfloat16 or float16, got Int)",
        "scale": "gain must be float32, bfloat16 or float16, got (Int|torch.int32)",
    },
    wrong_for_kernels={},
    wrong={
        r"down must have shape \[B, 64\].*, got \[10, 63\]": narrower("down"),
        r"down must have shape \[B, 64\].*, got \[0, 64\]": lambda problem: problem.change(down=problem["down"][:0]),
        r"down_bias must have shape \[10\].*, got \[9\]": narrower("down_bias"),
        r"up must have shape \[64, 10\].*, got \[64, 9\]": narrower("up"),
        r"up_bias must have shape \[64\].*, got \[63\]": narrower("up_bias"),
        r"norm_weight must have shape \[64\].*, got \[63\]": narrower("norm_weight"),
        r"norm_bias must have shape \[64\].*, got \[63\]": narrower("norm_bias"),
        r"gain must have shape \[1\].*, got \[2\]": twice("scale"),
        r"residual must have shape \[30, 64\].*, got \[30, 63\]": narrower("residual"),
        r"residual must have shape \[60, 64\].*, got \[30, 64\]": twice("x"),
        r"x must have shape \[..., D\] with a width D above zero, got \[\]": lambda problem: problem.change(
            x=problem["x"][0, 0]
        ),
        "norm_weight and norm_bias must be given both or neither": lambda problem: problem.change(norm_bias=None),
        "activation must be relu, gelu or silu, got tanh": lambda problem: problem.change(activation="tanh"),
    },
    raw=_raw_adapter,
    raw_backward=_raw_adapter_backward,
    layouts=ROW_LAYOUTS,
    laid_out=("x", "residual"),
    laid_out_sizes=(60, 64, 10),
    rows_alone=True,
    by_luck=("dscale",),  # test_gradient_of_the_gain_over_many_draws looks at it
)
ATTENTION_POOL = Tested(
    problems.ATTENTION_POOL,
    usual=("all tokens", "masked"),
    everything={"masked": 0.5},
    sizes=dict.fromkeys(
        [
            (3, 1, 64, 12),
            (2, 7, 64, 1),
            (1, POOL_TILE - 1, 768, 12),
            (2, POOL_TILE, 64, 16),
            (1, POOL_TILE + 1, 1024, 1),
            (1, CUDA_POOL_PART, 136, 16),
            (1, CUDA_POOL_PART + 1, 1160, 12),
            (2, POOL_SPLIT - 1, 64, 64),
            (1, POOL_SPLIT, 1024, 16),
            (2, POOL_SPLIT + 1, 768, 5),
            (2, 197, 768, 12),
            (1, 577, 136, 33),
        ]
    ),
    odd_sizes=((2, 70, 770, 7), (2, 70, 33, 7)),
    small=(3, 30, 64, 10),
    other=(3, 147, 64, 10),
    mixed=(2, 150, 768, 12),
    several=(2, 300, 64),
    long=(3, 577, 64, 12),
    ordered=tuple(((2, 131, 136, heads), dtype) for heads, dtype in _OF_POOLING),
    unsupported={
        f"{_CUDA_WIDTHS}770": (1, 2, 770, 3),
        f"{_CUDA_WIDTHS}8200": (1, 2, 8200, 3),
        "number of heads H must be at most 64, got 65": (1, 2, 64, 65),
    },
    wrong_for_kernels={},
    wrong={
        rf"visual must have shape \[B, N, D\] with N and D above zero, got \[{got}\]": change
        for got, change in {
            "30, 64": lambda problem: problem.change(visual=problem["visual"][0]),
            "3, 0, 64": lambda problem: problem.change(visual=problem["visual"][:, :0]),
            "3, 30, 0": lambda problem: problem.change(visual=problem["visual"][..., :0]),
        }.items()
    }
    | {
        rf"query must have shape \[3, H, 64\] with H above zero, got \[{got}\]": change
        for got, change in {
            "3, 64": lambda problem: problem.change(query=problem["query"][:, 0]),
            "3, 0, 64": lambda problem: problem.change(query=problem["query"][:, :0]),
            "2, 10, 64": lambda problem: problem.change(query=problem["query"][:2]),
            "3, 10, 63": narrower("query"),
        }.items()
    }
    | {
        r"mask must have shape \[3, 30\], got \[3, 29\]": lambda problem: problem.change(mask=problem["mask"][:, :29]),
        r"mask must have shape \[3, 30\], got \[3, 30, 1\]": lambda problem: problem.change(
            mask=problem["mask"][..., None]
        ),
        "mask must be bool, True where a token takes part, got .*Float|mask must be bool.*float32": lambda problem: (
            problem.change(mask=problem["mask"].float())
        ),
    },
    raw=_raw_attention_pool,
    raw_backward=_raw_attention_pool_backward,
    layouts=SAMPLE_LAYOUTS,
    laid_out=("visual", "query"),
    laid_out_sizes=(3, 150, 64, 12),
)
TESTED = {str(tested): tested for tested in (APT, ADAPTER, ATTENTION_POOL)}
