"""Models filled from the authors' files compute what the authors' models do, restated in plain torch from the files."""

import original_checkpoints as originals
import original_models
import pytest
import tiny_meter
import tiny_vilt
import torch
from checkpoint_checks import METER, METHODS, VILT, assert_refused, outcome_of
from safetensors.torch import save_file
from tiny_vilt import randomize, snapshot
from transformers import ViltForImageAndTextRetrieval, ViltForMaskedLM, ViltForQuestionAnswering, ViltModel

import petl_ext
from petl_ext import APTConfig, ClassTokenConfig, DASConfig, FullTuningConfig
from petl_ext.models import load_meter_checkpoint, load_vilt_checkpoint

FAMILIES = {"vilt": (*VILT, original_models.vilt), "meter": (*METER, original_models.meter)}
every_family = pytest.mark.parametrize("family", FAMILIES)
SKIPPED = {"vilt": (1,), "meter": (0, 4)}
TOKEN = {
    "vilt": "vilt.embeddings.text_embeddings.class_token.vector",
    "meter": "meter.cross_modal_text_transform.class_token.vector",
}


def checkpoint_of(family, method=None, token=True):
    """As the authors' code would have saved it, with weights far from where they start."""
    tiny, checkpoint, *_ = FAMILIES[family]
    model = tiny.make_model(seed=1)
    if method:
        randomize(petl_ext.attach(model, METHODS[method]))
    state = checkpoint(model, "vqa_classifier", method)
    if family == "meter":
        for key in state:
            if key.endswith("APT.scale"):
                state[key].zero_()  # where it stays
    return state | {"token4classifier": torch.randn(1, 1, tiny.DIM)} if token else state


def expected_logits(family, state, inputs, skipped=()):
    wide = {name: t.double() if t.is_floating_point() else t for name, t in (state | inputs).items()}
    return FAMILIES[family][3](wide, **{name: wide.pop(name) for name in inputs}, skipped=skipped)


def assert_computes(family, model, state, skipped=()):
    inputs = FAMILIES[family][0].make_inputs(model)
    model = model.double()
    wide = inputs | {"pixel_values": inputs["pixel_values"].double()}
    with torch.no_grad():
        logits = model(**wide).logits
    torch.testing.assert_close(logits, expected_logits(family, state, inputs, skipped), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("token", [True, False], ids=["token", "none"])
@pytest.mark.parametrize("method", [None, *METHODS])
@every_family
def test_logits_are_the_originals(save, family, method, token):
    tiny, _, load, _ = FAMILIES[family]
    state, fresh = checkpoint_of(family, method, token), tiny.make_model()
    attachment = petl_ext.attach(fresh, METHODS[method]) if method else None
    report = load(fresh, save(originals.lightning(state)))
    skipped = SKIPPED[family] if method == "das" else ()
    if skipped:
        attachment.skip(skipped)
    assert_computes(family, fresh, state, skipped)
    assert (TOKEN[family] in dict(fresh.named_parameters())) == token
    if token:
        assert outcome_of(report, "token4classifier").names == (TOKEN[family],)
        assert attachment is None or fresh.petl_attachment is attachment
        assert fresh.petl_attachment.config.class_token or not method
        del state["token4classifier"]
        assert not torch.allclose(
            expected_logits(family, state, tiny.make_inputs(fresh)), fresh(**doubled(tiny, fresh)).logits, rtol=1e-2
        )


def doubled(tiny, model):
    inputs = tiny.make_inputs(model)
    return inputs | {"pixel_values": inputs["pixel_values"].double()}


@every_family
def test_what_is_saved_of_a_loaded_model_brings_the_token_back(save, family, tmp_path):
    tiny, _, load, _ = FAMILIES[family]
    state, model = checkpoint_of(family, "apt"), tiny.make_model()
    attachment = petl_ext.attach(model, METHODS["apt"], keep=["classifier"])
    load(model, save(state))
    assert attachment.config == APTConfig(num_prompts=5, rank=2, train_scale=family == "vilt", class_token=True)
    attachment.save(tmp_path / "saved")
    again = tiny.make_model()
    load(again, {k: t for k, t in state.items() if "APT" not in k and k != "token4classifier"})  # the backbone
    assert petl_ext.load(again, tmp_path / "saved").config == attachment.config
    assert_computes(family, again, state)
    assert snapshot(again.float()) == snapshot(model)
    attachment.detach()
    del state["token4classifier"]
    without = {key: tensor for key, tensor in state.items() if "APT" not in key}
    assert_computes(family, model, without)


@every_family
def test_the_token_trains_and_all_else_trains_as_before(save, family):
    tiny, _, load, _ = FAMILIES[family]
    path = save(checkpoint_of(family))
    for config, attached in ((None, ClassTokenConfig()), (FullTuningConfig(), FullTuningConfig(class_token=True))):
        model = tiny.make_model()
        if config:
            petl_ext.attach(model, config)
        frozen, _ = next(model.named_parameters())
        model.get_parameter(frozen).requires_grad_(False)
        report = load(model, path)
        assert report.settings["what is attached"] == f"{attached}, was {config or 'none'}"
        assert model.petl_attachment.config == attached
        assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [frozen]
        tiny.run(model, tiny.make_inputs(model)).square().sum().backward()
        assert model.get_parameter(TOKEN[family]).grad.any()
        model.petl_attachment.detach()
        assert model.state_dict().keys() == tiny.make_model().state_dict().keys()


@every_family
def test_a_disabled_attachment_gets_the_token_when_it_is_back(save, family):
    tiny, _, load, _ = FAMILIES[family]
    state, model = checkpoint_of(family, "apt"), tiny.make_model()
    attachment = petl_ext.attach(model, METHODS["apt"])
    backbone = {key: tensor for key, tensor in state.items() if "APT" not in key and key != "token4classifier"}
    with attachment.disable():
        load(model, save(state))
        assert_computes(family, model, backbone)
    assert_computes(family, model, state)


@every_family
def test_a_token_that_is_there_is_filled(save, family):
    tiny, _, load, _ = FAMILIES[family]
    state, model = checkpoint_of(family), tiny.make_model()
    attachment = petl_ext.attach(model, ClassTokenConfig())
    report = load(model, save(state))
    assert "what is attached" not in report.settings
    assert model.petl_attachment is attachment
    assert_computes(family, model, state)


@every_family
def test_a_token_in_ignore_is_not_attached(save, family):
    tiny, _, load, _ = FAMILIES[family]
    state, model = checkpoint_of(family), tiny.make_model()
    report = load(model, save(state), ["token4classifier"])
    assert outcome_of(report, "token4classifier").action == "ignored"
    assert not hasattr(model, "petl_attachment")
    del state["token4classifier"]
    assert_computes(family, model, state)


@pytest.mark.parametrize("method", [None, "apt", "das"])
@every_family
def test_a_file_with_a_token_is_refused_whole(save, family, method):
    tiny, _, load, _ = FAMILIES[family]
    state, model = checkpoint_of(family, method), tiny.make_model()
    attachment = petl_ext.attach(model, METHODS[method]) if method else None
    before = attachment and (attachment.config, attachment.sites)
    assert_refused(load, model, save(state | {"extra": torch.ones(1)}), r"unknown keys \(1\): extra")
    token = {"token4classifier": torch.ones(1, 1, tiny.DIM + 1)}
    assert_refused(load, model, save(state | token), rf"token4classifier \[1, 1, {tiny.DIM + 1}\] for ")
    assert before == (attachment and (attachment.config, attachment.sites))
    load(model, save(state))
    if attachment:
        attachment.detach()
        assert model.state_dict().keys() == tiny.make_model().state_dict().keys()


@every_family
def test_a_part_of_an_attached_model_gets_no_token(save, family):
    tiny, _, load, _ = FAMILIES[family]
    state, model = checkpoint_of(family), tiny.make_model()
    petl_ext.attach(model, METHODS["apt"])
    part = getattr(model, family)
    message = r"holds token4classifier, but no class token can be attached to \w+; name it in ignore .* around"
    assert_refused(load, part, save(state), message)
    whole = tiny.make_model()
    petl_ext.attach(getattr(whole, family), METHODS["apt"])
    load(whole, save(checkpoint_of(family, "apt")))
    assert getattr(whole, family).petl_attachment.config.class_token


def test_layers_for_a_file_of_another_method_are_still_asked_for(save):
    path = save(checkpoint_of("vilt", "apt"))
    hint = r"attach APTConfig\(num_prompts=5, rank=2\) first"
    assert_refused(load_vilt_checkpoint, tiny_vilt.make_model(), path, hint)
    model = tiny_vilt.make_model()
    petl_ext.attach(model, ClassTokenConfig())
    assert_refused(load_vilt_checkpoint, model, path, hint)


@pytest.mark.parametrize(
    "model_class", [ViltModel, ViltForQuestionAnswering, ViltForImageAndTextRetrieval, ViltForMaskedLM]
)
def test_norms_of_vilt_are_the_originals(save, model_class):
    model = tiny_vilt.make_model(model_class, layer_norm_eps=1e-4)
    report = load_vilt_checkpoint(model, save(checkpoint_of("vilt", token=False)))
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    for name, value in eps.items():
        if "layernorm" in name:
            assert value == 1e-6
        elif not name.startswith("classifier"):
            assert value == 1e-12
    assert len(eps) == 2 * tiny_vilt.LAYERS + 2 + (model_class in (ViltForQuestionAnswering, ViltForMaskedLM))
    told = {name for name in report.settings if name.endswith(".eps")}
    assert told == {f"{name}.eps" for name in eps if not name.startswith("classifier")}
    assert report.settings[next(name for name in told if "layernorm" in name)] == "1e-06, was 0.0001"
    again = load_vilt_checkpoint(model, save(checkpoint_of("vilt", token=False)))
    assert again.settings == {}


def test_a_refused_file_leaves_the_norms(save):
    model = tiny_vilt.make_model()
    assert_refused(load_vilt_checkpoint, model, save(checkpoint_of("vilt") | {"extra": torch.ones(1)}), "extra")
    assert {module.eps for module in model.vilt.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-12}


def test_the_scale_of_meters_apt_does_not_train(save):
    model = tiny_meter.make_model()
    attachment = petl_ext.attach(model, METHODS["apt"], keep=["classifier"])
    trained = attachment.report().trained
    report = load_meter_checkpoint(model, save(checkpoint_of("meter", "apt", token=False)))
    assert attachment.config == APTConfig(num_prompts=5, rank=2, train_scale=False)
    assert report.settings["what is attached"] == f"{attachment.config}, was {METHODS['apt']}"
    scales = [name for name, _ in model.named_parameters() if name.endswith("log_scale")]
    assert len(scales) == 4 * tiny_meter.LAYERS
    assert not any(model.get_parameter(name).requires_grad for name in scales)
    assert attachment.report().trained == trained - len(scales)
    assert {name for name, _ in attachment.named_parameters()}.isdisjoint(scales)
    backbone = tiny_meter.make_model()
    petl_ext.attach(backbone, METHODS["apt"])
    assert load_meter_checkpoint(backbone, save(checkpoint_of("meter", token=False))).settings == {}
    assert backbone.petl_attachment.config.train_scale


WAYS = {
    "torch": lambda state, path: torch.save(state, path),
    "lightning": lambda state, path: torch.save(originals.lightning(state), path),
    "safetensors": save_file,
    "mapping": None,
    "lightning mapping": None,
    "parameters": None,
}


@pytest.mark.parametrize("way", WAYS)
@every_family
def test_every_way_to_hand_over_a_checkpoint(family, way, tmp_path):
    tiny, _, load, _ = FAMILIES[family]
    state, model, path = checkpoint_of(family), tiny.make_model(), tmp_path / "model.weights"
    given = {
        "mapping": state,
        "lightning mapping": originals.lightning(state),
        "parameters": {
            key: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor for key, tensor in state.items()
        },
    }
    if WAYS[way]:
        WAYS[way](state, path)
    report = load(model, given.get(way, str(path)))
    assert report.source == ("the state dict" if way in given else str(path))
    assert str(report).startswith(f"{report.source} -> ")
    assert all(parameter.is_leaf for parameter in model.parameters())
    assert_computes(family, model, state)


def test_what_is_no_checkpoint():
    model = tiny_vilt.make_model()
    refused = {
        3: "checkpoint must be a path or a state dict, got int",
        None: "got NoneType",
        b"model.ckpt": "got bytes",
        tiny_vilt.make_model(): "got ViltForQuestionAnswering",
    }
    for given, message in refused.items():
        assert_refused(load_vilt_checkpoint, model, given, message, error=TypeError)
    state = checkpoint_of("vilt")
    message = "the state dict must be .*got list under 'transformer.norm.bias'"
    assert_refused(load_vilt_checkpoint, model, state | {"transformer.norm.bias": [0.0]}, message)
    assert_refused(load_vilt_checkpoint, model, {1: torch.ones(1)}, "the state dict must be .*got Tensor under 1")
    assert_refused(load_vilt_checkpoint, model, {}, "the state dict is not an original ViLT checkpoint.*none")
    assert_refused(load_meter_checkpoint, tiny_meter.make_model(), state, "the state dict seems to be an original ViLT")
    del state["transformer.norm.bias"]
    assert_refused(load_vilt_checkpoint, model, state, r"the state dict does not fit .*\n.*: vilt.layernorm.bias$")


def test_das_with_layers_removed_keeps_the_token(save):
    state, model = checkpoint_of("meter", "das"), tiny_meter.make_model()
    attachment = petl_ext.attach(model, METHODS["das"])
    load_meter_checkpoint(model, save(state))
    attachment.skip(SKIPPED["meter"])
    attachment.remove_skipped()
    assert attachment.config == DASConfig(
        bottleneck=3, bypass_bottleneck=4, skip=SKIPPED["meter"], permanent=True, class_token=True
    )
    assert_computes("meter", model, state, SKIPPED["meter"])
