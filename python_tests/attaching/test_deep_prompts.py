"""Deep prompts in ViLT against attention over all N + P rows, of which the prompts' are then dropped, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_vilt import CONFIGS, make_inputs, make_model, randomize, run

import petl_ext

ROWS = 7


def rows_through(module, rows):
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(rows, rows.shape[-1:], module.weight, module.bias, module.eps)
    return F.linear(rows, module.weight, module.bias)


def block_by_hand(block, hidden, mask):
    """One pre-norm block on hidden [B, N, D]; mask [B, N] says which rows may be attended to."""
    attention = block.attention.attention
    prompts = attention.deep_prompts.prompts
    (batch, rows, dim), num_prompts = hidden.shape, len(prompts)
    everything = rows_through(block.layernorm_before, torch.cat([hidden, prompts.expand(batch, -1, -1)], dim=1))
    visible = torch.cat([mask, mask.new_ones(batch, num_prompts)], dim=1)
    query, key, value = (rows_through(part, everything) for part in (attention.query, attention.key, attention.value))
    width = attention.attention_head_size
    heads = []
    for start in range(0, dim, width):
        q, k, v = (t[..., start : start + width] for t in (query, key, value))
        scores = (q @ k.mT / math.sqrt(width)).masked_fill(~visible[:, None], -math.inf)
        heads.append(scores.softmax(-1) @ v)
    context = torch.cat(heads, dim=-1)[:, :rows]
    hidden = hidden + rows_through(block.attention.output.dense, context)
    inner = F.gelu(rows_through(block.intermediate.dense, rows_through(block.layernorm_after, hidden)))
    return hidden + rows_through(block.output.dense, inner)


@pytest.fixture
def model():
    model = make_model().double()
    randomize(petl_ext.attach(model, CONFIGS[1]))
    return model


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_equals_attention_over_all_rows(model, padded):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, ROWS, model.config.hidden_size, generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    upstream = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    visible = torch.ones(3, ROWS, dtype=torch.bool)
    visible[0, 2:5] = not padded
    mask = torch.zeros(3, 1, ROWS, ROWS, dtype=torch.float64).masked_fill(
        ~visible[:, None, None], torch.finfo(torch.float64).min
    )
    wanted = [hidden, *model.petl_attachment.parameters()]

    output = model.vilt.encoder(hidden, attention_mask=mask if padded else None).last_hidden_state
    expected = hidden
    for block in model.vilt.encoder.layer:
        expected = block_by_hand(block, expected, visible)

    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(output, wanted, upstream)
    for ours, by_hand in zip(gradients, torch.autograd.grad(expected, wanted, upstream), strict=True):
        assert by_hand.any()
        torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-10)


def test_attentions_show_the_prompts_after_the_sequence(model):
    output = model(**make_inputs(model), output_attentions=True)
    rows = output.attentions[0].shape[-2]
    assert all(weights.shape[-2:] == (rows, rows + 3) for weights in output.attentions)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones_like(output.attentions[0][..., 0]))
    assert output.attentions[0][0, :, :, 3:6].max() < 1e-12  # the padded text
    assert output.attentions[0][..., rows:].min() > 0


def test_attention_dropout_is_the_models():
    model = make_model(attention_probs_dropout_prob=0.5)
    petl_ext.attach(model, CONFIGS[1])
    inputs = make_inputs(model)
    model.vilt.encoder.layer[0].attention.attention.train()
    assert not torch.equal(run(model, inputs), run(model.eval(), inputs))


def test_prompts_start_uniform():
    prompts = petl_ext.DeepPromptConfig(num_prompts=2000).new_layer(768).prompts
    bound = 0.0625
    assert prompts.abs().max() <= bound
    assert abs(prompts.std().item() - bound / math.sqrt(3)) < 1e-3 * bound
    assert abs(prompts.mean().item()) < 1e-3 * bound
