"""What is special to ops.attention_pool; what holds of every op is in test_every_op.py."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import CPU_DEVICES, CUDA_DEVICES, device_and_dtype
from memory import saved_for_backward
from op_problems import ATTENTION_POOL, POOL_TILE, assert_equal, check
from problems import draw
from tolerance import assert_as_good_as_torch

from petl_ext import ops

ON_CPU = pytest.mark.parametrize("device", CPU_DEVICES, ids=str, indirect=True)
ON_CUDA = pytest.mark.parametrize("device", CUDA_DEVICES, ids=str, indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
MASKED = pytest.mark.parametrize("masked", [None, 0.5], ids=["all tokens", "masked"])


def make_problem(*sizes, **options):
    return draw(ATTENTION_POOL.op, *sizes, **options)


@ON_CPU
@MASKED
@DTYPES
@pytest.mark.parametrize(("tokens", "dim", "heads"), [(577, 1024, 64), (4096, 64, 12)])
def test_many_tokens(device, tokens, dim, heads, dtype, masked):
    check(device, make_problem(1, tokens, dim, heads, dtype=dtype, masked=masked))


@ON_CPU
def test_width_of_one(device):
    check(device, make_problem(2, 70, 1, 7, std=1))


@DTYPES
def test_one_token_that_has_all_the_weight(device, dtype):
    """It is the result, to the bit, and the gradient of its score is what is left of a difference of equals: zero."""
    problem = make_problem(2, 197, 768, 12, dtype=dtype).to(device.torch_device)
    chosen = torch.arange(2 * 12, device=device.torch_device).view(2, 12) * 8
    pooled = torch.stack([visual[tokens] for visual, tokens in zip(problem["visual"], chosen, strict=True)])
    results = problem.change(query=2 * pooled).run(ops.attention_pool)
    dvisual = torch.zeros_like(problem["visual"])
    for sample in range(2):
        dvisual[sample, chosen[sample]] = problem.dout[sample]
    assert_equal(results, {"out": pooled, "dvisual": dvisual, "dquery": torch.zeros_like(pooled)})


@DTYPES
@pytest.mark.parametrize(
    ("score", "least", "greatest"), [(4, 0.2, 0.5), (7, 0.8, 0.9), (10, 0.99, 0.995), (16, 0.9999, 1)]
)
def test_one_token_that_has_most_of_the_weight(device, dtype, score, least, greatest):
    """What the scores' gradients depend on is then the difference of two numbers that are nearly equal."""
    problem = make_problem(3, 150, 256, 4, dtype=dtype, masked=0.2)
    problem["mask"][:, :4] = True
    own = problem["visual"][:, :4].float()
    query = score / problem["scale"] * own / own.square().sum(-1, keepdim=True)
    problem = problem.change(query=query.to(dtype))
    scores = problem["query"].float() @ problem["visual"].float().mT * problem["scale"]
    weights = scores.masked_fill(~problem["mask"][:, None], float("-inf")).softmax(-1).amax(-1)
    assert least < weights.min() and weights.max() < greatest, weights
    check(device, problem)


@ON_CPU
@DTYPES
def test_scores_of_hundreds_over_many_draws(device, dtype):
    """Of two tokens with nearly the same score, whose error is smaller is luck, and few such pairs have most of it."""
    problems = [make_problem(2, 50, 768, 12, dtype=dtype, std=30, seed=seed) for seed in range(48)]
    problems = [problem.to(device.torch_device) for problem in problems]

    def results(problems, function):
        runs = [problem.run(function) for problem in problems]
        return {name: torch.cat([run[name].flatten() for run in runs]) for name in runs[0]}

    oracle = results([problem.double() for problem in problems], ops.attention_pool_reference)
    theirs, ours = results(problems, ops.attention_pool_reference), results(problems, ops.attention_pool)
    for name in ours:
        assert_as_good_as_torch(name, ours[name], theirs[name], oracle[name])


def test_large_values_in_float16(device):
    """The tokens come close to float16's largest number, and the scores would be beyond it."""
    problem = make_problem(2, 197, 64, 12, dtype=torch.float16)
    problem = problem.change(visual=problem["visual"].clamp(-3, 3) * 20000, scale=problem["scale"] / 20000)
    scores = problem["visual"].float() @ problem["query"].float().mT
    assert problem["visual"].abs().max() > 50000 and scores.abs().max() > 65504
    oracle = problem.double().run(ops.attention_pool_reference)
    ours = problem.to(device.torch_device).run(ops.attention_pool)
    for name, result in ours.items():
        torch.testing.assert_close(result.double(), oracle[name], rtol=1e-3, atol=1e-3 * oracle[name].abs().max())


MASKS = {
    "the first": [0],
    "the last": [576],
    "one of each split": [5, 130, 300, 400, 570],
    "none of the middle splits": [0, 1, 2, 575, 576],
    "all but one": [n for n in range(577) if n != 300],
    "a tile and one more": list(range(100, 100 + POOL_TILE + 1)),
}


@pytest.mark.parametrize("name", MASKS)
@device_and_dtype
def test_mask(device, name, dtype):
    problem = make_problem(2, 577, 64, 12, dtype=dtype, masked=0.5)
    problem["mask"][1] = False
    problem["mask"][1, MASKS[name]] = True
    check(device, problem)


@device_and_dtype
def test_tokens_that_take_no_part_may_hold_anything(device, dtype):
    problem = make_problem(3, 197, 64, 12, dtype=dtype, masked=0.5).to(device.torch_device)
    expected = problem.run(ops.attention_pool)
    absent = ~problem["mask"][..., None]
    assert not expected["dvisual"].masked_select(absent).any()
    for value in (float("nan"), float("inf")):
        changed = problem.change(visual=problem["visual"].masked_fill(absent, value))
        assert_equal(changed.run(ops.attention_pool), expected)
        assert all(result.isfinite().all() for result in changed.run(ops.attention_pool_reference).values())


def test_mask_in_which_all_take_part_is_no_mask(device):
    problem = make_problem(2, 197, 64, 12).to(device.torch_device)
    masked = problem.change(mask=torch.ones(2, 197, dtype=torch.bool, device=device.torch_device))
    assert_equal(masked.run(ops.attention_pool), problem.run(ops.attention_pool))


@ON_CUDA
def test_sample_of_which_no_token_takes_part_becomes_nan(device):
    problem = make_problem(4, 70, 64, 3, masked=0.5).to(device.torch_device)
    problem["mask"][2] = False
    ours = problem.run(ops.attention_pool)
    assert ours["out"][2].isnan().all() and not ours["out"][[0, 1, 3]].isnan().any()
    assert all(not ours[name][[0, 1, 3]].isnan().any() for name in ("dvisual", "dquery"))


@ON_CPU
def test_sample_of_which_no_token_takes_part(device):
    problem = make_problem(4, 70, 64, 3, masked=0.5).to(device.torch_device)
    problem["mask"][2] = False
    message = "mask must let at least one token of each sample take part .*, got none for sample 2"
    with pytest.raises(RuntimeError, match=message):
        problem.call(ops.attention_pool)
    with pytest.raises(RuntimeError, match=message):
        problem.trained().call(ops.attention_pool)
    pooled = problem.double().call(ops.attention_pool)
    assert pooled[2].isnan().all() and not pooled[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("token", [0, 150])
def test_nan_stays_in_its_sample(device, token):
    problem = make_problem(3, 197, 64, 12).to(device.torch_device)
    problem["visual"][1, token, 5] = float("nan")
    for name, result in problem.run(ops.attention_pool).items():
        assert result[1].isnan().any() and not result[[0, 2]].isnan().any(), name


def test_infinite_score_is_as_in_torch(device):
    problem = make_problem(2, 70, 64, 3).to(device.torch_device)
    problem["visual"][0, 9] = torch.finfo(torch.float32).max
    problem["query"][0].abs_()
    ours, theirs = problem.call(ops.attention_pool), problem.call(ops.attention_pool_reference)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours[0].isnan().all()


def test_mask_and_samples_with_strides(device):
    problem = make_problem(3, 150, 64, 12, masked=0.5).to(device.torch_device)
    expected = problem.call(ops.attention_pool)
    assert torch.equal(problem.change(mask=problem["mask"].mT.contiguous().mT).call(ops.attention_pool), expected)
    shared = problem.change(visual=problem["visual"][:1].expand(3, 150, 64), mask=problem["mask"][:1].expand(3, 150))
    copied = shared.change(visual=shared["visual"].contiguous(), mask=shared["mask"].contiguous())
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


@ON_CPU
def test_more_samples_than_are_kept_at_a_time(device):
    """Of this size each sample's sums are a megabyte and more, and four megabytes are kept."""
    check(device, make_problem(7, 577, 1024, 64))


def test_a_sample_is_bit_equal_alone_and_in_a_batch(device):
    problem = make_problem(*device.cut((9, 300, 64, 12)), masked=0.2).to(device.torch_device)
    expected = problem.run(ops.attention_pool)
    alone = problem.change(**{name: problem[name][4:5] for name in ("visual", "query", "mask")})
    alone = replace(alone, dout=problem.dout[4:5])
    assert_equal(alone.run(ops.attention_pool), {name: result[4:5] for name, result in expected.items()})


@pytest.mark.parametrize("wanted", [0, 1], ids=["visual", "query"])
def test_gradient_that_is_not_asked_for_is_not_computed(device, wanted):
    arguments = next(ATTENTION_POOL.raw_backward(ATTENTION_POOL.problem().to(device.torch_device)))
    needs = (wanted == 0, wanted == 1)
    gradients = torch.ops.petl_ext.attention_pool_backward(*arguments[:-2], *needs)
    assert [gradient.numel() > 0 for gradient in gradients] == list(needs)


def test_float64_query_runs_the_reference():
    problem = ATTENTION_POOL.problem(dtype=torch.float64)
    mixed = problem.change(visual=problem["visual"].float())
    assert torch.equal(mixed.call(ops.attention_pool), mixed.call(ops.attention_pool_reference))


def test_reference_passes_gradcheck():
    problem = make_problem(2, 5, 6, 3, dtype=torch.float64, masked=0.3).trained()
    assert torch.autograd.gradcheck(
        lambda visual, query: ops.attention_pool(visual, query, problem["mask"], 0.5), tuple(problem.tensors.values())
    )


@MASKED
def test_it_is_multi_head_attention_of_one_query(masked):
    """With the key projection folded into the query, and the value projection of what was pooled: torch's own."""
    dim, heads = 24, 4
    problem = make_problem(3, 11, dim, heads, dtype=torch.float64, masked=masked)
    attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(attention.in_proj_bias)
    row = torch.randn(3, 1, dim, dtype=torch.float64)
    visual, absent = problem["visual"], None if problem["mask"] is None else ~problem["mask"]
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
    pooled = ops.attention_pool(visual, folded, problem["mask"], (dim // heads) ** -0.5)
    values = torch.einsum("bhd,hid->bhi", pooled, value_weight.unflatten(0, by_head)).flatten(1) + value_bias
    torch.testing.assert_close(attention.out_proj(values)[:, None], expected)


def test_reference_drops_out_weights():
    problem = make_problem(2, 100, 64, 3, masked=0.5)
    torch.manual_seed(0)
    dropping = functools.partial(ops.attention_pool_reference, dropout=0.5)
    exact = problem.call(ops.attention_pool_reference)
    assert not torch.equal(problem.call(dropping), exact)
    several = torch.stack([problem.call(dropping) for _ in range(2000)])
    torch.testing.assert_close(several.mean(0), exact, rtol=0, atol=0.15)


def test_saved_for_backward_are_inputs_and_what_has_the_size_of_the_result():
    problem = make_problem(8, 197, 768, 12).trained()
    saved = saved_for_backward(lambda: problem.call(ops.attention_pool), problem.tensors.values())
    assert sorted(saved) == [2 * 8 * 12 * 4, problem.dout.nbytes]


def test_backward_op_takes_what_forward_returned_only(device):
    arguments = next(ATTENTION_POOL.raw_backward(ATTENTION_POOL.problem(form="all tokens")))
    dpooled, visual, query, mask, pooled, statistics, *rest = arguments
    backward = torch.ops.petl_ext.attention_pool_backward
    with pytest.raises(
        RuntimeError, match="attention_pool: dpooled must have the dtype of visual, Float, got BFloat16"
    ):
        backward(dpooled.bfloat16(), visual, query, mask, pooled, statistics, *rest)
    with pytest.raises(RuntimeError, match=r"attention_pool: pooled must have shape \[3, 10, 64\], got \[3, 9, 64\]"):
        backward(dpooled, visual, query, mask, pooled[:, 1:], statistics, *rest)
    with pytest.raises(RuntimeError, match="attention_pool: statistics must be contiguous and Float"):
        backward(dpooled, visual, query, mask, pooled, statistics.double(), *rest)


def test_autocast_rounds_the_tokens_to_its_dtype(device):
    problem = ATTENTION_POOL.problem(form="all tokens").to(device.torch_device)
    with torch.autocast(device.torch_device.type, torch.bfloat16):
        pooled, reference = problem.call(ops.attention_pool), problem.call(ops.attention_pool_reference)
    assert (pooled.dtype, reference.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(pooled, problem.change(visual=problem["visual"].bfloat16()).call(ops.attention_pool))
    torch.testing.assert_close(reference.float(), problem.call(ops.attention_pool), rtol=0.05, atol=0.05)
