"""Dropout in the kernels: the mask against an independent Philox, values and gradients under it, and where it comes
from."""

import numpy as np
import pytest
import torch
from devices import device_and_dtype
from memory import saved_for_backward
from op_problems import ADAPTER, APT, assert_equal, check, check_together
from problems import draw

from petl_ext import AdapterLayer, APTLayer, ops

of_each_op = pytest.mark.parametrize("tested", [APT, ADAPTER], ids=str)
SEEDS = torch.tensor([0x0123456789ABCDEF, 0x7EDCBA9876543210])


def philox(counter, key):
    """Philox4x32-10 of one counter of four words, by Python's integers."""
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = (
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        )
        key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
    return counter


def mask_by_hand(seeds, rows, columns, dropout):
    seed, offset = (value % 2**64 for value in seeds.tolist())
    kept = np.empty((rows, columns), dtype=bool)
    for row in range(rows):
        for column in range(columns):
            counter = (column // 4, row % 2**32, row >> 32, offset % 2**32)
            kept[row, column] = philox(counter, (seed % 2**32, seed >> 32))[column % 4] >= dropout * 2**32
    return torch.from_numpy(kept)


def seeds_on(device):
    return SEEDS.to(device.torch_device)


def dropping(tested, *sizes, dropout=0.3, **options):
    """A problem with dropout, whose mask is that of SEEDS."""
    problem = draw(tested.op, *sizes, **options)
    problem.options.update(dropout=dropout, seeds=SEEDS)
    return problem


def kept_by_the_kernel(device, rows, columns, dropout, seeds):
    """Of an adapter whose hidden units are ones, and whose up projection is the identity."""
    width = -(-columns // 8) * 8
    zeros, ones = torch.zeros(rows, width), torch.ones(columns)
    tensors = zeros, torch.zeros(columns, width), ones, torch.eye(width)[:, :columns], torch.zeros(width)
    return ops.adapter(*device.put(tensors), dropout=dropout, seeds=seeds)[:, :columns]


@pytest.mark.parametrize("words", [((0,) * 4, (0,) * 2), ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)])
def test_philox_by_hand_gives_the_published_words(words):
    """The known answers of Random123, in which Philox was published."""
    published = {
        0: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        0xFFFFFFFF: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    assert philox(*words) == published[words[0][0]]


@pytest.mark.parametrize("seeds", [SEEDS, -SEEDS, torch.tensor([0, 5])], ids=["large", "negative", "small"])
def test_mask_is_philox(seeds):
    expected = mask_by_hand(seeds, 9, 23, 0.3)
    assert torch.equal(ops.dropout_mask(seeds, 9, 23, 0.3), expected)
    assert expected.any() and not expected.all()


@pytest.mark.parametrize("columns", [1, 5, 70, 130, 500])
def test_kernels_keep_what_the_mask_says(device, columns):
    """Bit for bit, on every device, at every width of its tiles, and in rows of several of them."""
    for seeds, dropout in ((seeds_on(device), 0.3), (-seeds_on(device), 0.9)):
        rows = 20 if device.is_interpreted else 200
        kept = ops.dropout_mask(seeds, rows, columns, dropout)
        out = kept_by_the_kernel(device, rows, columns, dropout, seeds)
        assert torch.equal(out, kept * torch.tensor(1 / (1 - dropout), dtype=torch.float32).to(kept.device))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_share_of_what_is_dropped(dropout):
    """Over rows, columns and all within five deviations of a binomial distribution; and no two seeds are alike."""
    kept = ops.dropout_mask(torch.tensor([3, 4]), 2000, 400, dropout).double()
    variance = dropout * (1 - dropout)
    for share, number in ((kept.mean(), 800_000), (kept.mean(0), 2000), (kept.mean(1), 400)):
        assert ((share - (1 - dropout)).abs() <= 5 * (variance / number) ** 0.5).all()
    others = [ops.dropout_mask(torch.tensor(seeds), 2000, 400, dropout).double() for seeds in ([3, 5], [4, 4])]
    for other in others:
        together = ((kept - kept.mean()) * (other - other.mean())).mean() / variance
        assert together.abs() < 5 / 800_000**0.5


@device_and_dtype
@of_each_op
def test_values_and_gradients(device, tested, dtype):
    """ReLU at the greater sizes, since of a few units it is luck whether rounding lets one near zero through."""
    for form in tested.op.forms.values():
        for sizes, activation in (((35, 64, 20), tested.op.activations[-1]), ((150, 72, 130), "relu")):
            sizes, options = device.cut(sizes, 70), {**form, "dtype": dtype, "activation": activation}
            seeds = range(device.draws(8))
            check_together(device, [dropping(tested, *sizes, seed=seed, **options) for seed in seeds])


@of_each_op
def test_few_rows_of_a_wide_model(device, tested):
    """Which CUDA takes in two launches."""
    sizes = device.cut((37, 264, 90), 37)
    check(device, dropping(tested, *sizes, dtype=torch.bfloat16, **tested.op.form))


@of_each_op
def test_more_rows_than_one_slab(device, tested):
    check(device, dropping(tested, *device.cut((2100, 64, 17), 70), **tested.op.form))


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_smooth_activations(device, activation):
    check(device, dropping(ADAPTER, 35, 64, 20, activation=activation, norm=True, residual="x", gain=True))


@of_each_op
def test_float64_and_derivatives_of_gradients_have_the_same_mask(tested):
    problem = dropping(tested, 12, 16, 8, dtype=torch.float64)
    assert_equal(problem.run(tested.op.ours), problem.run(tested.op.reference))
    given = dropping(tested, 12, 16, 8, **({"activation": "softmax"} if tested is APT else {"activation": "gelu"}))
    results = []
    for problem, function in ((given, tested.op.ours), (given.double(), tested.op.reference)):
        problem = problem.trained()
        leaves = list(problem.tensors.values())
        first = torch.autograd.grad(problem.call(function), leaves, problem.dout, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves, allow_unused=True)
        results.append([gradient for gradient in second if gradient is not None])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@of_each_op
def test_seeds_come_from_the_generator(device, tested):
    problem = dropping(tested, 35, 64, 20).to(device.torch_device)
    problem.options["seeds"] = None
    torch.manual_seed(5)
    first, second = problem.run(tested.op.ours), problem.run(tested.op.ours)
    assert not torch.equal(first["out"], second["out"])
    torch.manual_seed(5)
    assert_equal(problem.run(tested.op.ours), first)
    torch.manual_seed(5)
    problem.options["seeds"] = torch.randint(2**63 - 1, (2,), device=device.torch_device)
    assert_equal(problem.run(tested.op.ours), first)


@of_each_op
def test_no_dropout_draws_nothing(device, tested):
    problem = dropping(tested, 35, 64, 20, dropout=0.0).to(device.torch_device)
    before = torch.get_rng_state()
    with_seeds, without = problem.run(tested.op.ours), draw(tested.op, 35, 64, 20).to(device.torch_device)
    assert_equal(with_seeds, without.run(tested.op.ours))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer", [lambda: APTLayer(64, 20, dropout=0.4), lambda: AdapterLayer(64, 20, dropout=0.4)])
def test_checkpointing_computes_the_same_again(layer, use_reentrant):
    torch.manual_seed(0)
    layer = layer()
    x = torch.randn(30, 64, requires_grad=True)
    inputs = (x, torch.randn(30, 64)) if isinstance(layer, APTLayer) else (x,)
    wanted = [x, *layer.parameters()]
    torch.manual_seed(1)
    expected = torch.autograd.grad(layer(*inputs).square().sum(), wanted)
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for leaf, gradient in zip(wanted, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)
    layer.eval()
    assert torch.equal(layer(*inputs), layer(*inputs))


@of_each_op
def test_two_integers_are_saved(tested):
    problems = [dropping(tested, 200, 64, 24, dropout=dropout).trained() for dropout in (0.0, 0.3)]
    without, with_dropout = (saved_for_backward(lambda p=p: p.call(tested.op.ours), given=()) for p in problems)
    assert sum(with_dropout) == sum(without) + 2 * SEEDS.element_size()


@of_each_op
def test_bits_do_not_depend_on_threads(tested):
    problem = dropping(tested, 5000, 64, 33)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = problem.run(tested.op.ours)
    try:
        torch.set_num_threads(5)
        assert_equal(problem.run(tested.op.ours), expected)
    finally:
        torch.set_num_threads(before)


@of_each_op
def test_a_row_is_dropped_by_its_number_alone(device, tested):
    """The first rows of many, which are taken in other tiles and by other kernels, and with leading axes."""
    problem = dropping(tested, *device.cut((2000, 264, 40), 70), dtype=torch.bfloat16).to(device.torch_device)
    rows = 24
    first = problem.change(**{name: problem[name][:rows] for name in tested.op.rows})
    few, many = first.call(tested.op.ours), problem.call(tested.op.ours)[:rows]
    torch.testing.assert_close(few, many, rtol=0.02, atol=0.02 * many.abs().max().item())
    folded = first.change(**{name: first[name].view(2, 3, 4, -1) for name in tested.op.rows})
    assert torch.equal(folded.call(tested.op.ours).view(rows, -1), few)


@of_each_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(tested, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(tested.op.ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in ((35, 64, 20), (47, 64, 20)):
        problem = dropping(tested, *sizes)
        assert_equal(problem.run(compiled), problem.run(tested.op.ours))
        problem.options["seeds"] = None
        assert not torch.equal(problem.call(compiled), problem.call(compiled))


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_compiled_backward_pass_drops_what_its_forward_pass_did(is_checkpointed):
    """Of hidden units that are their biases, which are ones, and an up projection that is the identity: so the biases'
    gradients are the sums of the output."""
    torch._dynamo.reset()
    down_bias, eye = torch.ones(24, requires_grad=True), torch.eye(24)

    def call(x):
        return ops.adapter(x, torch.zeros(24, 24), down_bias, eye, torch.zeros(24), dropout=0.4)

    def again(x):
        return torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)

    compiled = torch.compile(again if is_checkpointed else call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out = compiled(torch.zeros(64, 24))
        (gradient,) = torch.autograd.grad(out.sum(), down_bias)
        assert (out == 0).any() and torch.allclose(gradient, out.sum(0))


@of_each_op
def test_opcheck(device, tested):
    problem = tested.problem().to(device.torch_device)
    more = None, 0.25, seeds_on(device)
    torch.library.opcheck(device.raw(tested.op, "forward"), (*tested.raw(problem), *more))
    for arguments in tested.raw_backward(problem):
        torch.library.opcheck(device.raw(tested.op, "backward"), (*arguments, *more[1:]))


@of_each_op
def test_wrong_seeds_are_refused(device, tested):
    problem = dropping(tested, 35, 64, 20).to(device.torch_device)
    for seeds in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)):
        problem.options["seeds"] = seeds
        for function in (tested.op.ours, tested.op.reference):
            with pytest.raises(RuntimeError, match=rf"{tested}: seeds must be int64 with shape \[2\], got"):
                problem.call(function)


@of_each_op
def test_seeds_of_another_device_are_refused(tested):
    problem = dropping(tested, 35, 64, 20)
    problem.options["seeds"] = SEEDS.to("meta")
    with pytest.raises(RuntimeError, match=f"{tested}: all arguments must be on one device, got cpu, meta"):
        problem.call(tested.op.ours)


@of_each_op
def test_raw_ops_refuse_what_is_no_dropout(device, tested):
    problem = tested.problem().to(device.torch_device)
    forward = device.raw(tested.op, "forward")
    with pytest.raises(RuntimeError, match=f"{tested}: seeds must be given where dropout is above 0"):
        forward(*tested.raw(problem), None, 0.25, None)
    for dropout in (1.0, -0.5, float("nan")):
        with pytest.raises((RuntimeError, ValueError), match=rf"{tested}: dropout must lie in \[0, 1\), got"):
            forward(*tested.raw(problem), None, dropout, seeds_on(device))


def test_mask_refuses_what_is_no_dropout():
    with pytest.raises(ValueError, match=r"dropout_mask: dropout must lie in \[0, 1\), got 1"):
        ops.dropout_mask(SEEDS, 2, 3, 1)
    with pytest.raises(RuntimeError, match=r"dropout_mask: seeds must be int64 with shape \[2\], got torch.float32"):
        ops.dropout_mask(SEEDS.float(), 2, 3, 0.1)
