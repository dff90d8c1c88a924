"""VisualPromptLayer: exactness against attention with all its projections, dropout, sizes, refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from prompt_projections import with_all_projections

from petl_ext import VisualPromptLayer

B, N = 3, 7
SIZES = {
    "BERT": {"dim": 24, "num_heads": 4},
    "LLaMA": {"dim": 40, "num_heads": 2, "visual_dim": 24, "inner_dim": 16},
    "one head": {"dim": 8, "num_heads": 1, "visual_dim": 5},
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def make_layer(sizes, **changes):
    torch.manual_seed(0)
    return VisualPromptLayer(**sizes | changes).double()


def make_inputs(layer, masked=False):
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(B, N, layer.value.in_features, generator=generator).double()
    query = torch.randn(B, layer.query.in_features, generator=generator).double()
    mask = torch.rand(B, N, generator=generator) > 0.5
    mask[:, 2] = True
    return visual, query, mask if masked else None


def gradients(function, layer, tensors):
    inputs = [t.clone().requires_grad_() for t in tensors]
    prompt = function(*inputs)
    dprompt = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(2), dtype=prompt.dtype)
    named = dict(layer.named_parameters())
    found = torch.autograd.grad(prompt, [*inputs, *named.values()], dprompt)
    return prompt, dict(zip(["visual", "query", *named], found, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@every_size
def test_exactly_attention_with_all_projections(sizes, masked):
    layer = make_layer(sizes)
    visual, query, mask = make_inputs(layer, masked)
    ours, our_gradients = gradients(lambda v, q: layer(v, q, mask), layer, (visual, query))
    theirs, their_gradients = gradients(lambda v, q: with_all_projections(layer, v, q, mask), layer, (visual, query))
    torch.testing.assert_close(ours, theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], msg=lambda text, name=name: f"{name}: {text}")
    assert not our_gradients["key.bias"].any()
    others = [name for name in our_gradients if name != "key.bias"]
    assert all(our_gradients[name].any() for name in others)


@every_size
@torch.no_grad()
def test_dropout_is_on_the_weights_in_training_only(sizes):
    layer = make_layer(sizes, dropout=0.4)
    visual, query, mask = make_inputs(layer, masked=True)
    torch.manual_seed(3)
    found = layer.train()(visual, query, mask)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones(B, layer.num_heads, 1, N).double(), 0.4)
    expected = with_all_projections(layer, visual, query, mask, kept)
    torch.testing.assert_close(found, expected)
    whole = with_all_projections(layer, visual, query, mask)
    torch.testing.assert_close(layer.eval()(visual, query, mask), whole)
    assert not torch.allclose(expected, whole, rtol=1e-2)


@torch.no_grad()
def test_dropout_draws_anew():
    layer = make_layer(SIZES["BERT"], dropout=0.4)
    inputs = make_inputs(layer)
    assert not torch.equal(layer(*inputs), layer(*inputs))


@torch.no_grad()
def test_masked_tokens_do_not_count():
    layer = make_layer(SIZES["BERT"])
    visual, query, mask = make_inputs(layer, masked=True)
    changed = torch.where(mask[..., None], visual, torch.full_like(visual, 1e3))
    torch.testing.assert_close(layer(changed, query, mask), layer(visual, query, mask))
    rows = [layer(v[m][None], q[None]) for v, q, m in zip(visual, query, mask, strict=True)]
    torch.testing.assert_close(torch.cat(rows), layer(visual, query, mask))


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({"dim": 768}, 2_362_368),
        ({"dim": 4096, "num_heads": 16, "visual_dim": 768, "inner_dim": 512}, 4_986_368),
        ({"dim": 4096, "num_heads": 16, "visual_dim": 1024, "inner_dim": 512}, 5_248_512),  # on ScienceQA
    ],
)
def test_published_sizes(sizes, parameters):
    layer = VisualPromptLayer(**sizes, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == parameters


def test_names_and_initialization():
    layer = VisualPromptLayer(40, 2, visual_dim=24, inner_dim=16)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    weights = {"query": (16, 40), "key": (16, 24), "value": (16, 24), "output": (40, 16)}
    assert shapes == {
        f"{name}.{part}": shape if part == "weight" else shape[:1]
        for name, shape in weights.items()
        for part in ("weight", "bias")
    }
    layer = VisualPromptLayer(768)
    for parameter in layer.parameters():
        assert 0.95 * 768**-0.5 < parameter.abs().max().item() <= 768**-0.5


@torch.no_grad()
def test_autocast():
    layer = make_layer(SIZES["BERT"]).float()
    visual, query, _ = make_inputs(layer)
    whole = layer(visual.float(), query.float())
    with torch.autocast("cpu", torch.bfloat16):
        prompt = layer(visual.float(), query.float())
    assert prompt.dtype is torch.bfloat16
    torch.testing.assert_close(prompt.float(), whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    layer = make_layer(SIZES["BERT"])
    visual, query, _ = make_inputs(layer)
    expected = layer(visual, query)
    prompt = layer.to(dtype)(visual.to(dtype), query.to(dtype))
    assert prompt.dtype is dtype
    error = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(prompt.double(), expected, **error)
    prompt.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_deepcopy_and_pickle():
    layer = make_layer(SIZES["LLaMA"])
    inputs = make_inputs(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*inputs), layer(*inputs))


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", 0), ("num_heads", 2.0), ("visual_dim", -1), ("inner_dim", True), ("inner_dim", 10), ("dropout", 1)],
)
def test_wrong_sizes_are_refused(name, value):
    with pytest.raises(ValueError, match=f"VisualPromptLayer: {name} must .*got {value!r}"):
        VisualPromptLayer(**{"dim": 24, "num_heads": 4, name: value})


def test_wrong_inputs_are_refused():
    layer = make_layer(SIZES["LLaMA"])
    visual, query, mask = make_inputs(layer, masked=True)
    hidden = mask.clone()
    hidden[1] = False
    refusals = [
        ((visual[..., 1:], query), r"visual must be \[B, N, 24\].*got \[3, 7, 23\]"),
        ((visual[0], query), r"visual must be .*got \[7, 24\]"),
        ((visual[:, :0], query), r"N above zero, got \[3, 0, 24\]"),
        ((visual, query[:2]), r"query must be \[3, 40\].*got \[2, 40\]"),
        ((visual, query[:, None]), r"query must be \[3, 40\].*got \[3, 1, 40\]"),
        ((visual, query, mask[:, 1:]), r"mask must be bool \[3, 7\], got torch.bool \[3, 6\]"),
        ((visual, query, mask.long()), r"mask must be bool .*got torch.int64"),
        ((visual, query, hidden), "mask hides all tokens of sample 1"),
    ]
    for arguments, message in refusals:
        with pytest.raises(ValueError, match=message):
            layer(*arguments)


WRAPPED = {
    "hooked": lambda layer: layer.key.register_forward_hook(lambda module, inputs, output: 2 * output),
    "hooked before": lambda layer: layer.value.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "another forward": lambda layer: setattr(layer.key, "forward", lambda x: layer.value(x) ** 2),
    "parametrized": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.value),
    "replaced": lambda layer: setattr(layer, "key", torch.nn.Sequential(layer.key, torch.nn.Tanh())),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("masked", [False, True])
def test_what_wraps_a_projection_takes_part(wrap, masked):
    torch.manual_seed(0)
    layer = VisualPromptLayer(16, 4, 8).eval()
    visual, query = torch.randn(3, 7, 8), torch.randn(3, 16)
    mask = torch.arange(7)[None].expand(3, 7) < 5 if masked else None
    plain = layer(visual, query, mask)
    wrap(layer)
    heads = [layer.query(query)[:, None], layer.key(visual), layer.value(visual)]
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in heads)
    expected = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    found = layer(visual, query, mask)
    torch.testing.assert_close(found, layer.output(expected.transpose(1, 2).flatten(1)))
    if wrap is not WRAPPED["parametrized"]:
        assert not torch.allclose(found, plain)
    found.sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if not name.startswith("key"))
