"""ops.attention_pool against its reference: values, gradients, and every way in which PyTorch may call it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from places import CPU_PLACES, CUDA_PLACES, DEVICE_PLACES, emulation
from tolerance import assert_as_good_as_torch, outputs_and_gradients

from petl_ext import ops

TILE, SPLIT = 64, 128  # tokens that are taken at a time, and that one thread takes at most on the CPU
ON_CPU = pytest.mark.parametrize("place", CPU_PLACES, ids=str, indirect=True)
ON_CUDA = pytest.mark.parametrize("place", CUDA_PLACES, ids=str, indirect=True)


@dataclass
class Problem:
    visual: torch.Tensor
    query: torch.Tensor
    dpooled: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float = 0.125

    def call(self, function, **options):
        return function(self.visual, self.query, self.mask, self.scale, **options)

    def run(self, function):
        """{"pooled": the output, "dvisual": ..., "dquery": ...}."""
        results = outputs_and_gradients(
            lambda visual, query: replace(self, visual=visual, query=query).call(function),
            [self.visual, self.query],
            self.dpooled,
        )
        return dict(zip(("pooled", "dvisual", "dquery"), results, strict=True))

    def convert(self, to):
        """The problem with each tensor but the mask moved or converted by `to`."""
        return replace(self, visual=to(self.visual), query=to(self.query), dpooled=to(self.dpooled))

    def on(self, place):
        return replace(
            self.convert(lambda tensor: tensor.to(place.device)),
            mask=None if self.mask is None else self.mask.to(place.device),
        )

    def double(self):
        return self.convert(lambda tensor: tensor.double())

    def raw(self):
        return self.visual, self.query, self.mask, self.scale

    def raw_backward(self, needs):
        saved = torch.ops.petl_ext.attention_pool_forward(*self.raw())
        return (self.dpooled, self.visual, self.query, self.mask, *saved, self.scale, *needs)


def make_problem(
    batch, tokens, dim, heads, dtype=torch.float32, query_dtype=None, masked=None, std=None, scale=0.125, seed=0
):
    """masked: the probability that a token takes no part; the first always does. std: of the query, by default such
    that scores have a deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    std = std or 2 / (scale * dim**0.5)
    mask = None
    if masked is not None:
        mask = torch.rand(batch, tokens, generator=generator) >= masked
        mask[:, 0] = True
    return Problem(
        normal(batch, tokens, dim).to(dtype),
        (std * normal(batch, heads, dim)).to(query_dtype or dtype),
        normal(batch, heads, dim).to(dtype),
        mask,
        scale,
    )


def check(place, problem):
    problem = problem.on(place)
    oracle, theirs = problem.double().run(ops.attention_pool_reference), problem.run(ops.attention_pool_reference)
    ours = problem.run(ops.attention_pool)
    for name, result in ours.items():
        expected = problem.query.dtype if name == "dquery" else problem.visual.dtype
        assert result.dtype == expected, f"{name} has dtype {result.dtype}, expected {expected}"
        assert_as_good_as_torch(name, result, theirs[name], oracle[name])


def assert_equal(results, expected):
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
MASKED = pytest.mark.parametrize("masked", [None, 0.5], ids=["all tokens", "masked"])


@MASKED
@DTYPES
@pytest.mark.parametrize(
    ("batch", "tokens", "dim", "heads"),
    [
        (3, 1, 64, 12),
        (2, 7, 64, 1),
        (1, TILE - 1, 768, 12),
        (2, TILE, 64, 16),
        (1, TILE + 1, 1024, 1),
        (2, SPLIT - 1, 64, 64),
        (1, SPLIT, 1024, 16),
        (2, SPLIT + 1, 768, 5),
        (2, 197, 768, 12),
        (1, 577, 136, 33),
    ],
)
def test_values_and_gradients(place, batch, tokens, dim, heads, dtype, masked):
    check(place, make_problem(batch, tokens, dim, heads, dtype, masked=masked))


@ON_CPU
@MASKED
@DTYPES
@pytest.mark.parametrize(("tokens", "dim", "heads"), [(577, 1024, 64), (4096, 64, 12)])
def test_many_tokens(place, tokens, dim, heads, dtype, masked):
    check(place, make_problem(1, tokens, dim, heads, dtype, masked=masked))


@ON_CPU
@DTYPES
@pytest.mark.parametrize("dim", [33, 770])
def test_width_that_is_no_multiple_of_eight(place, dim, dtype):
    check(place, make_problem(2, 70, dim, 7, dtype, masked=0.3))


@ON_CPU
def test_width_of_one(place):
    check(place, make_problem(2, 70, 1, 7, std=1))


@ON_CUDA
@pytest.mark.parametrize(
    ("dim", "heads", "message"),
    [
        (770, 3, "width D must be a multiple of 8 up to 8192, got 770"),
        (8200, 3, "width D must be a multiple of 8 up to 8192, got 8200"),
        (64, 65, "number of heads H must be at most 64, got 65"),
    ],
)
def test_sizes_that_cuda_does_not_support(place, dim, heads, message):
    problem = make_problem(1, 2, dim, heads).on(place)
    with pytest.raises(RuntimeError, match=message):
        problem.call(ops.attention_pool)


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@DTYPES
def test_query_in_another_dtype(place, dtype, query_dtype):
    check(place, make_problem(2, 150, 768, 12, dtype, query_dtype))


@DTYPES
def test_one_token_that_has_all_the_weight(place, dtype):
    """It is the result, to the bit, and the gradient of its score is what is left of a difference of equals: zero."""
    problem = make_problem(2, 197, 768, 12, dtype).on(place)
    chosen = torch.arange(2 * 12, device=place.device).view(2, 12) * 8
    pooled = torch.stack([visual[tokens] for visual, tokens in zip(problem.visual, chosen, strict=True)])
    results = replace(problem, query=2 * pooled).run(ops.attention_pool)
    dvisual = torch.zeros_like(problem.visual)
    for sample in range(2):
        dvisual[sample, chosen[sample]] = problem.dpooled[sample]
    assert_equal(results, {"pooled": pooled, "dvisual": dvisual, "dquery": torch.zeros_like(pooled)})


@DTYPES
@pytest.mark.parametrize(
    ("score", "least", "greatest"), [(4, 0.2, 0.5), (7, 0.8, 0.9), (10, 0.99, 0.995), (16, 0.9999, 1)]
)
def test_one_token_that_has_most_of_the_weight(place, dtype, score, least, greatest):
    """What the scores' gradients depend on is then the difference of two numbers that are nearly equal."""
    problem = make_problem(3, 150, 256, 4, dtype, masked=0.2)
    problem.mask[:, :4] = True
    own = problem.visual[:, :4].float()
    problem = replace(problem, query=(score / problem.scale * own / own.square().sum(-1, keepdim=True)).to(dtype))
    weights = (problem.query.float() @ problem.visual.float().mT * problem.scale).masked_fill(
        ~problem.mask[:, None], float("-inf")
    )
    weights = weights.softmax(-1).amax(-1)
    assert least < weights.min() and weights.max() < greatest, weights
    check(place, problem)


@ON_CPU
@DTYPES
def test_scores_of_hundreds_over_many_draws(place, dtype):
    """Of two tokens with nearly the same score, whose error is smaller is luck, and few such pairs have most of it."""
    problems = [make_problem(2, 50, 768, 12, dtype, std=30, seed=seed).on(place) for seed in range(48)]

    def results(problems, function):
        runs = [problem.run(function) for problem in problems]
        return {name: torch.cat([run[name].flatten() for run in runs]) for name in runs[0]}

    oracle = results([problem.double() for problem in problems], ops.attention_pool_reference)
    theirs, ours = results(problems, ops.attention_pool_reference), results(problems, ops.attention_pool)
    for name in ours:
        assert_as_good_as_torch(name, ours[name], theirs[name], oracle[name])


def test_large_values_in_float16(place):
    """The tokens come close to float16's largest number, and the scores would be beyond it."""
    problem = make_problem(2, 197, 64, 12, torch.float16)
    problem = replace(problem, visual=problem.visual.clamp(-3, 3) * 20000, scale=problem.scale / 20000)
    scores = problem.visual.float() @ problem.query.float().mT
    assert problem.visual.abs().max() > 50000 and scores.abs().max() > 65504
    oracle, ours = problem.double().run(ops.attention_pool_reference), problem.on(place).run(ops.attention_pool)
    for name, result in ours.items():
        torch.testing.assert_close(result.double(), oracle[name], rtol=1e-3, atol=1e-3 * oracle[name].abs().max())


MASKS = {
    "the first": [0],
    "the last": [576],
    "one of each split": [5, 130, 300, 400, 570],
    "none of the middle splits": [0, 1, 2, 575, 576],
    "all but one": [n for n in range(577) if n != 300],
    "a tile and one more": list(range(100, 100 + TILE + 1)),
}


@pytest.mark.parametrize("name", MASKS)
@DTYPES
def test_mask(place, name, dtype):
    problem = make_problem(2, 577, 64, 12, dtype, masked=0.5)
    problem.mask[1] = False
    problem.mask[1, MASKS[name]] = True
    check(place, problem)


@DTYPES
def test_tokens_that_take_no_part_may_hold_anything(place, dtype):
    problem = make_problem(3, 197, 64, 12, dtype, masked=0.5).on(place)
    expected = problem.run(ops.attention_pool)
    absent = ~problem.mask[..., None]
    assert torch.equal(
        expected["dvisual"].masked_select(absent), torch.zeros_like(problem.visual[absent.expand_as(problem.visual)])
    )
    for value in (float("nan"), float("inf")):
        changed = replace(problem, visual=problem.visual.masked_fill(absent, value))
        assert_equal(changed.run(ops.attention_pool), expected)
        assert all(result.isfinite().all() for result in changed.run(ops.attention_pool_reference).values())


def test_mask_in_which_all_take_part_is_no_mask(place):
    problem = make_problem(2, 197, 64, 12).on(place)
    masked = replace(problem, mask=torch.ones(2, 197, dtype=torch.bool, device=place.device))
    assert_equal(masked.run(ops.attention_pool), problem.run(ops.attention_pool))


@ON_CUDA
def test_sample_of_which_no_token_takes_part_becomes_nan(place):
    problem = make_problem(4, 70, 64, 3, masked=0.5).on(place)
    problem.mask[2] = False
    ours = problem.run(ops.attention_pool)
    assert ours["pooled"][2].isnan().all() and not ours["pooled"][[0, 1, 3]].isnan().any()
    assert all(not ours[name][[0, 1, 3]].isnan().any() for name in ("dvisual", "dquery"))


@ON_CPU
def test_sample_of_which_no_token_takes_part(place):
    problem = make_problem(4, 70, 64, 3, masked=0.5).on(place)
    problem.mask[2] = False
    message = "mask must let at least one token of each sample take part .*, got none for sample 2"
    with pytest.raises(RuntimeError, match=message):
        problem.call(ops.attention_pool)
    with pytest.raises(RuntimeError, match=message):
        problem.convert(lambda tensor: tensor.clone().requires_grad_()).call(ops.attention_pool)
    pooled = problem.double().call(ops.attention_pool)
    assert pooled[2].isnan().all() and not pooled[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("token", [0, 150])
def test_nan_stays_in_its_sample(place, token):
    problem = make_problem(3, 197, 64, 12).on(place)
    problem.visual[1, token, 5] = float("nan")
    for name, result in problem.run(ops.attention_pool).items():
        assert result[1].isnan().any() and not result[[0, 2]].isnan().any(), name


def test_infinite_score_is_as_in_torch(place):
    problem = make_problem(2, 70, 64, 3).on(place)
    problem.visual[0, 9] = torch.finfo(torch.float32).max
    problem.query[0].abs_()
    ours, theirs = problem.call(ops.attention_pool), problem.call(ops.attention_pool_reference)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours[0].isnan().all()


LAYOUTS = {
    "without the first token": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
    "every other token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "part of the width": lambda t: torch.cat([t, t], 2)[..., :64],
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.mT.contiguous().mT,
    "not aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@DTYPES
def test_any_strides(place, layout, dtype):
    problem = make_problem(3, 150, 64, 12, dtype).on(place)
    expected = problem.run(ops.attention_pool)
    visual, query, dpooled = (
        LAYOUTS[layout](t) for t in (problem.visual.requires_grad_(), problem.query.requires_grad_(), problem.dpooled)
    )
    pooled = ops.attention_pool(visual, query, None, problem.scale)
    gradients = torch.autograd.grad(pooled, (problem.visual, problem.query), dpooled)
    assert pooled.is_contiguous()
    assert_equal(dict(zip(expected, (pooled, *gradients), strict=True)), expected)


def test_mask_and_samples_with_strides(place):
    problem = make_problem(3, 150, 64, 12, masked=0.5).on(place)
    expected = problem.call(ops.attention_pool)
    assert torch.equal(replace(problem, mask=problem.mask.mT.contiguous().mT).call(ops.attention_pool), expected)
    shared = replace(problem, visual=problem.visual[:1].expand(3, 150, 64), mask=problem.mask[:1].expand(3, 150))
    copied = replace(shared, visual=shared.visual.contiguous(), mask=shared.mask.contiguous())
    assert_equal(shared.run(ops.attention_pool), copied.run(ops.attention_pool))


def test_tokens_are_not_copied_where_their_rows_are_contiguous():
    """A slice of a large tensor would show in what torch allocates."""
    visual, query = torch.randn(2, 200, 768)[:, 1:], torch.randn(2, 12, 768)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.attention_pool(visual, query)
    allocated = sum(
        max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profile.key_averages()
    )
    assert 0 < allocated < 2 * query.nbytes


def test_expanded_gradient():
    problem = make_problem(2, 30, 64, 10).convert(lambda tensor: tensor.requires_grad_())
    leaves = (problem.visual, problem.query)
    by_sum = torch.autograd.grad(problem.call(ops.attention_pool).sum(), leaves)
    by_ones = torch.autograd.grad(problem.call(ops.attention_pool), leaves, torch.ones(2, 10, 64))
    assert all(torch.equal(a, b) for a, b in zip(by_sum, by_ones, strict=True))


@MASKED
def test_empty_batch(place, masked):
    problem = make_problem(0, 30, 64, 10, masked=masked).on(place)
    shapes = {name: tuple(result.shape) for name, result in problem.run(ops.attention_pool).items()}
    assert shapes == {"pooled": (0, 10, 64), "dvisual": (0, 30, 64), "dquery": (0, 10, 64)}


@ON_CPU
def test_more_samples_than_are_kept_at_a_time(place):
    """Of this size each sample's sums are a megabyte and more, and four megabytes are kept."""
    check(place, make_problem(7, 577, 1024, 64))


@DTYPES
@MASKED
def test_two_runs_are_bit_equal(place, dtype, masked):
    problem = make_problem(3, 577, 64, 12, dtype, masked=masked).on(place)
    assert_equal(problem.run(ops.attention_pool), problem.run(ops.attention_pool))


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bit_equal_whatever_the_number_of_threads(threads, dtype):
    problem = make_problem(3, 577, 64, 12, dtype, masked=0.2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = problem.run(ops.attention_pool)
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_equal(problem.run(ops.attention_pool), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("copies", ["lazy", "eager"])
def test_cuda_kernels_give_the_same_bits_in_whatever_order_they_run(order, copies):
    """A missing barrier or wait would show: warps run in either order, asynchronous copies land early or late."""
    for heads, dtype in ((12, torch.bfloat16), (40, torch.float16), (40, torch.float32)):
        problem = make_problem(2, 131, 136, heads, dtype, masked=0.2)
        with emulation():
            expected = problem.run(ops.attention_pool)
        with emulation(order=order, copies=copies):
            assert_equal(problem.run(ops.attention_pool), expected)


def test_a_sample_is_bit_equal_alone_and_in_a_batch(place):
    problem = make_problem(9, 300, 64, 12, masked=0.2).on(place)
    expected = problem.run(ops.attention_pool)
    alone = replace(problem.convert(lambda tensor: tensor[4:5]), mask=problem.mask[4:5])
    assert_equal(alone.run(ops.attention_pool), {name: result[4:5] for name, result in expected.items()})


def test_only_the_gradients_asked_for(place):
    problem = make_problem(2, 150, 64, 10, masked=0.2).on(place)
    expected = problem.run(ops.attention_pool)
    for wanted, frozen in (("visual", "query"), ("query", "visual")):
        tensors = {name: getattr(problem, name).clone().requires_grad_(name == wanted) for name in (wanted, frozen)}
        replace(problem, **tensors).call(ops.attention_pool).backward(problem.dpooled)
        assert torch.equal(tensors[wanted].grad, expected[f"d{wanted}"]) and tensors[frozen].grad is None
        raw = torch.ops.petl_ext.attention_pool_backward(*problem.raw_backward((wanted == "visual", wanted == "query")))
        assert raw[wanted == "visual"].numel() == 0


def test_float64_runs_the_reference():
    problem = make_problem(2, 30, 64, 10, torch.float64, masked=0.2)
    assert_equal(problem.run(ops.attention_pool), problem.run(ops.attention_pool_reference))
    mixed = replace(problem, visual=problem.visual.float())
    assert torch.equal(mixed.call(ops.attention_pool), mixed.call(ops.attention_pool_reference))


def test_reference_passes_gradcheck():
    problem = make_problem(2, 5, 6, 3, torch.float64, masked=0.3).convert(lambda tensor: tensor.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda visual, query: ops.attention_pool(visual, query, problem.mask, 0.5), (problem.visual, problem.query)
    )


@MASKED
def test_it_is_multi_head_attention_of_one_query(masked):
    """With the key projection folded into the query, and the value projection of what was pooled: torch's own."""
    dim, heads = 24, 4
    problem = make_problem(3, 11, dim, heads, torch.float64, masked=masked)
    attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(attention.in_proj_bias)
    row = torch.randn(3, 1, dim, dtype=torch.float64)
    visual, absent = problem.visual, None if problem.mask is None else ~problem.mask
    expected = attention(row, visual, visual, key_padding_mask=absent, need_weights=False)[0]
    (query_weight, key_weight, value_weight), (query_bias, _, value_bias) = (
        parameter.chunk(3) for parameter in (attention.in_proj_weight, attention.in_proj_bias)
    )
    by_head = (heads, dim // heads)
    folded = torch.einsum(
        "bhi,hid->bhd",
        F.linear(row[:, 0], query_weight, query_bias).unflatten(-1, by_head),
        key_weight.unflatten(0, by_head),
    )
    pooled = ops.attention_pool(visual, folded, problem.mask, (dim // heads) ** -0.5)
    values = torch.einsum("bhd,hid->bhi", pooled, value_weight.unflatten(0, by_head)).flatten(1) + value_bias
    torch.testing.assert_close(attention.out_proj(values)[:, None], expected)


def test_reference_drops_out_weights():
    problem = make_problem(2, 100, 64, 3, masked=0.5)
    torch.manual_seed(0)
    dropped = problem.call(ops.attention_pool_reference, dropout=0.5)
    assert not torch.equal(dropped, problem.call(ops.attention_pool_reference))
    several = torch.stack([problem.call(ops.attention_pool_reference, dropout=0.5) for _ in range(2000)])
    torch.testing.assert_close(several.mean(0), problem.call(ops.attention_pool_reference), rtol=0, atol=0.15)


def test_saved_for_backward_are_inputs_and_what_has_the_size_of_the_result():
    problem = make_problem(8, 197, 768, 12).convert(lambda tensor: tensor.requires_grad_())
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pooled = problem.call(ops.attention_pool)
    for tensor in (problem.visual, problem.query):
        saved.pop(tensor.data_ptr())
    assert sorted(saved.values()) == [2 * 8 * 12 * 4, pooled.nbytes]


@pytest.mark.parametrize("place", DEVICE_PLACES, ids=str, indirect=True)
@MASKED
def test_opcheck(place, masked):
    problem = make_problem(2, 150, 64, 10, masked=masked).on(place)
    torch.library.opcheck(torch.ops.petl_ext.attention_pool_forward.default, problem.raw())
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.petl_ext.attention_pool_backward.default, problem.raw_backward(needs))


@pytest.mark.parametrize("place", DEVICE_PLACES, ids=str, indirect=True)
@MASKED
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(place, dynamic, masked):
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention_pool, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (30, 147):
        problem = make_problem(2, tokens, 64, 10, masked=masked).on(place)
        assert_equal(problem.run(compiled), problem.run(ops.attention_pool))


SIZES = (3, 30, 64, 10)  # of the problems below
WRONG = {
    "visual must be float32, bfloat16 or float16, got Int": lambda p: replace(p, visual=p.visual.int()),
    "query must be float32, bfloat16 or float16, got Int": lambda p: replace(p, query=p.query.int()),
}
# These are seen under torch.compile, in float64 and by the kernels alike.
WRONG_EVERYWHERE = {
    r"visual must have shape \[B, N, D\] with N and D above zero, got \[30, 64\]": lambda p: replace(
        p, visual=p.visual[0]
    ),
    r"visual must have shape \[B, N, D\] with N and D above zero, got \[3, 0, 64\]": lambda p: replace(
        p, visual=p.visual[:, :0]
    ),
    r"visual must have shape \[B, N, D\] with N and D above zero, got \[3, 30, 0\]": lambda p: replace(
        p, visual=p.visual[..., :0]
    ),
    r"query must have shape \[3, H, 64\] with H above zero, got \[3, 64\]": lambda p: replace(p, query=p.query[:, 0]),
    r"query must have shape \[3, H, 64\] with H above zero, got \[3, 0, 64\]": lambda p: replace(
        p, query=p.query[:, :0]
    ),
    r"query must have shape \[3, H, 64\] with H above zero, got \[2, 10, 64\]": lambda p: replace(p, query=p.query[:2]),
    r"query must have shape \[3, H, 64\] with H above zero, got \[3, 10, 63\]": lambda p: replace(
        p, query=p.query[..., :63]
    ),
    r"mask must have shape \[3, 30\], got \[3, 29\]": lambda p: replace(p, mask=p.mask[:, :29]),
    r"mask must have shape \[3, 30\], got \[3, 30, 1\]": lambda p: replace(p, mask=p.mask[..., None]),
    "mask must be bool, True where a token takes part, got .*Float|mask must be bool.*float32": lambda p: replace(
        p, mask=p.mask.float()
    ),
}


@pytest.mark.parametrize("message", WRONG | WRONG_EVERYWHERE)
def test_wrong_arguments_are_named(place, message):
    problem = make_problem(*SIZES, masked=0.5).on(place)
    with pytest.raises(RuntimeError, match=f"attention_pool: ({message})"):
        (WRONG | WRONG_EVERYWHERE)[message](problem).call(ops.attention_pool)


@pytest.mark.parametrize("message", WRONG_EVERYWHERE)
def test_wrong_arguments_in_float64_and_under_compile(message):
    problem = WRONG_EVERYWHERE[message](make_problem(*SIZES, masked=0.5))
    with pytest.raises(RuntimeError, match=f"attention_pool: ({message})"):
        problem.double().call(ops.attention_pool)
    meta = replace(problem.convert(lambda tensor: tensor.to("meta")), mask=problem.mask.to("meta"))
    with pytest.raises(RuntimeError, match=f"attention_pool: ({message})"):
        meta.call(ops.attention_pool)


def test_tensors_on_two_devices():
    problem = make_problem(*SIZES)
    with pytest.raises(RuntimeError, match="all arguments must be on one device, got cpu, meta"):
        replace(problem, query=problem.query.to("meta")).call(ops.attention_pool)


def test_backward_op_takes_what_forward_returned_only(place):
    dpooled, visual, query, mask, pooled, statistics, *rest = make_problem(*SIZES).raw_backward((True, True))
    backward = torch.ops.petl_ext.attention_pool_backward
    with pytest.raises(
        RuntimeError, match="attention_pool: dpooled must have the dtype of visual, Float, got BFloat16"
    ):
        backward(dpooled.bfloat16(), visual, query, mask, pooled, statistics, *rest)
    with pytest.raises(RuntimeError, match=r"attention_pool: pooled must have shape \[3, 10, 64\], got \[3, 9, 64\]"):
        backward(dpooled, visual, query, mask, pooled[:, 1:], statistics, *rest)
    with pytest.raises(RuntimeError, match="attention_pool: statistics must be contiguous and Float"):
        backward(dpooled, visual, query, mask, pooled, statistics.double(), *rest)


def test_autocast_rounds_the_tokens_to_its_dtype(place):
    problem = make_problem(*SIZES).on(place)
    with torch.autocast(place.device.type, torch.bfloat16):
        pooled, reference = problem.call(ops.attention_pool), problem.call(ops.attention_pool_reference)
    assert (pooled.dtype, reference.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(pooled, replace(problem, visual=problem.visual.bfloat16()).call(ops.attention_pool))
    torch.testing.assert_close(reference.float(), problem.call(ops.attention_pool), rtol=0.05, atol=0.05)


def test_several_python_threads_at_once(place):
    problems = [make_problem(2, 300, 64, 10 + i, seed=i).on(place) for i in range(4)]
    expected = [problem.run(ops.attention_pool) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for result, wanted in zip(pool.map(lambda p: p.run(ops.attention_pool), problems), expected, strict=True):
                assert_equal(result, wanted)


def test_works_after_an_error(place):
    problem = make_problem(*SIZES, masked=0.5).on(place)
    expected = problem.run(ops.attention_pool)
    with pytest.raises(RuntimeError):
        replace(problem, query=problem.query[:1]).call(ops.attention_pool)
    assert_equal(problem.run(ops.attention_pool), expected)


def test_device_without_kernel():
    problem = make_problem(*SIZES).convert(lambda tensor: tensor.to("meta"))
    for op, arguments in (
        (torch.ops.petl_ext.attention_pool_forward, problem.raw()),
        (torch.ops.petl_ext.attention_pool_backward, problem.raw_backward((True, True))),
    ):
        with pytest.raises(NotImplementedError, match=r"no kernel for meta.*attention_pool_reference"):
            op.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), *arguments)
