"""DVP models saved, loaded, copied, offloaded, quantized and exported."""

import copy
import json
import pickle
import warnings

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from dvp_checks import differ, every_family, logits, with_and_without_adapters
from tiny_dvp import DIM, LABELS, LAYERS, VISUAL, VISUAL_DIM, make_inputs, make_language_model, make_model

from petl_ext.models import DVPBert


@with_and_without_adapters
@every_family
@torch.no_grad()
def test_files(family, use_adapters, tmp_path):
    model = make_model(family, insert_layer=1, use_adapters=use_adapters)
    inputs = make_inputs(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith("language_model"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.insert_layer = 2
    model.save(tmp_path / "saved")
    tensors = safetensors.torch.load_file(tmp_path / "saved" / "petl_weights.safetensors")
    assert tensors.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    again = type(model).load(tmp_path / "saved", make_language_model(family).double())
    assert again.insert_layer == 2 and again.options == model.options
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("use_adapters", [False, True])
def test_a_folder_of_before_knows_no_width(use_adapters, tmp_path):
    model = make_model("bert", use_adapters=use_adapters)
    model.save(tmp_path / "saved")
    options = json.loads((tmp_path / "saved" / "petl_config.json").read_text())["options"]
    edit_description(tmp_path / "saved", options={k: v for k, v in options.items() if k != "adapter_bottleneck"})
    again = DVPBert.load(tmp_path / "saved", make_language_model("bert").double())
    assert again.options == model.options
    edit_description(tmp_path / "saved", options={k: v for k, v in options.items() if k != "num_heads"})
    with pytest.raises(ValueError, match=r"the keys must be .*num_heads.* got"):
        DVPBert.load(tmp_path / "saved", make_language_model("bert").double())


@torch.no_grad()
def test_files_of_a_search(tmp_path):
    model = make_model("bert", candidates="all")
    model.save(tmp_path / "saved")
    again = DVPBert.load(tmp_path / "saved", make_language_model("bert").double())
    assert len(again.visual_prompts) == LAYERS
    again.insert_layer = model.insert_layer = 2
    inputs = make_inputs(model)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def edit_description(folder, **changes):
    path = folder / "petl_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "petl_weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


QUERY = "visual_prompts.0.query.weight"
BAD_FILES = {
    "another class": (lambda f: edit_description(f, model="DVPT5"), "saved from a DVPT5, not a DVPBert"),
    "another option": (lambda f: edit_description(f, options={"heads": 3}), "the keys must be .*num_heads.* got"),
    "another key": (lambda f: edit_description(f, extra=1), "the keys must be .* got .*extra"),
    "a later format": (lambda f: edit_description(f, format=2), "format 2"),
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(QUERY)), f"{QUERY}: missing"),
    "a tensor too many": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "x: unexpected"),
    "another shape": (lambda f: edit_tensors(f, lambda t: t.update({QUERY: torch.ones(1)})), f"{QUERY} must have"),
    "no weights": (lambda f: (f / "petl_weights.safetensors").unlink(), "got no petl_weights.safetensors"),
}


@pytest.mark.parametrize(("edit", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_leave_the_language_model_as_it_was(edit, message, tmp_path):
    folder = tmp_path / "saved"
    make_model("bert", use_adapters=True).save(folder)
    edit(folder)
    bert = make_language_model("bert")
    bert.embeddings.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    trained = {name for name, p in bert.named_parameters() if p.requires_grad}
    classes = [type(module) for module in bert.modules()]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DVPBert.load(folder, bert)
    assert bert.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in bert.state_dict().items())
    assert {name for name, p in bert.named_parameters() if p.requires_grad} == trained
    assert [type(module) for module in bert.modules()] == classes


@every_family
@torch.no_grad()
def test_deepcopy_and_pickle(family):
    model = make_model(family, insert_layer=1, use_adapters=True)
    inputs = make_inputs(model)
    expected = logits(model, inputs)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.zero_()
    for twin in twins:
        assert torch.equal(logits(twin, inputs), expected)


@every_family
@torch.no_grad()
def test_state_dicts_hold_tied_weights_once(family):
    model = make_model(family, use_adapters=True)
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert set(state) >= {name for name, _ in model.named_parameters()}
    other = make_model(family, seed=5, use_adapters=True)
    inputs = make_inputs(model)
    assert differ(logits(other, inputs), logits(model, inputs))
    other.load_state_dict(state)
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    parent = torch.nn.ModuleList([model])
    torch.nn.ModuleList([other]).load_state_dict(parent.state_dict())


def test_weights_that_accelerate_offloads():
    model = make_model("bert", insert_layer=1).eval()
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(cpu_offload(model, torch.device("cpu"))(**inputs).logits, expected)


def test_dynamic_quantization_of_the_visual_prompt():
    model = make_model("bert", insert_layer=1).float().eval()
    quantized = copy.deepcopy(model.visual_prompts[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        torch.ao.quantization.quantize_dynamic(quantized, {torch.nn.Linear}, inplace=True)
    visual, query = torch.randn(3, VISUAL, VISUAL_DIM), torch.randn(3, DIM)
    heads = [quantized.query(query)[:, None], quantized.key(visual), quantized.value(visual)]
    q, k, v = (t.unflatten(-1, (quantized.num_heads, -1)).transpose(1, 2) for t in heads)
    expected = quantized.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
    torch.testing.assert_close(quantized(visual, query), expected, rtol=1e-3, atol=1e-3)
    model.visual_prompts[0] = quantized
    assert model(**make_inputs(model)).logits.isfinite().all()


@every_family
def test_exported_with_sizes_that_change(family):
    model = make_model(family, use_adapters=True, num_labels=LABELS).float()
    inputs, larger = make_inputs(model), make_inputs(model, batch=5)
    larger = {name: torch.cat([tensor, tensor[:, :1]], dim=1) for name, tensor in larger.items()}

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, visual_features):
            return self.model(input_ids, attention_mask, visual_features=visual_features).logits

    dim = torch.export.Dim
    # Of one row more than a length with a name, transformers' LLaMA makes a bound, with or without a prompt.
    sizes = {0: dim("batch", min=2, max=64), 1: dim.AUTO if family == "llama" else dim("length", min=2, max=11)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "visual_features": {0: sizes[0], 1: dim("visual", min=2)}}
    program = torch.export.export(Logits(), (), inputs, dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(program(**larger), Logits()(**larger))
