"""Checkpoints that hold APT, adapters or prompts: loaded into what is attached, or refused."""

import original_checkpoints as originals
import pytest
import tiny_vilt
import torch
from checkpoint_checks import METER, METHODS, VILT, assert_equal, assert_refused

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig, DeepPromptConfig
from petl_ext.models.checkpoints import load_vilt_checkpoint


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_attached_layers(save, family, method):
    tiny, checkpoint, load = family
    trained, fresh = originals.with_original_norms(tiny.make_model(seed=1)), tiny.make_model(seed=0)
    tiny_vilt.randomize(petl_ext.attach(trained, METHODS[method], keep=["classifier"]))
    petl_ext.attach(fresh, METHODS[method])
    state = checkpoint(trained, "vqa_classifier", method)
    report = load(fresh, save(state))
    assert_equal(fresh, trained)
    inputs = tiny.make_inputs(trained)
    with torch.no_grad():
        assert torch.equal(tiny.run(fresh, inputs), tiny.run(trained, inputs))
    added = trained.state_dict().keys() - tiny.make_model().state_dict().keys()
    assert added
    assert added <= {name for outcome in report.keys for name in outcome.names}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_layers_that_the_model_does_not_have(save, family, method):
    tiny, checkpoint, load = family
    trained = tiny.make_model(seed=1)
    petl_ext.attach(trained, METHODS[method])
    path = save(checkpoint(trained, "vqa_classifier", method))
    frozen = {VILT: "", METER: ", train_scale=False"}[family]
    hints = {
        "apt": [rf"attach APTConfig\(num_prompts=5, rank=2{frozen}\) first"],
        "sequential": [r"attach AdapterConfig\(bottleneck=3\) first"],
        "parallel": [r'attach AdapterConfig\(kind="parallel", bottleneck=3\) first'],
        "das": [r"attach DASConfig\(bottleneck=3\) first", r"attach DASConfig\(bypass_bottleneck=4\) first"],
    }
    for hint in hints[method]:
        assert_refused(load, tiny.make_model(), path, hint)


def test_layers_of_another_size_or_at_other_places(save):
    trained = tiny_vilt.make_model(seed=1)
    petl_ext.attach(trained, METHODS["apt"])
    path = save(originals.vilt_checkpoint(trained, "vqa_classifier", "apt"))
    fresh = tiny_vilt.make_model()
    petl_ext.attach(fresh, APTConfig(num_prompts=6, rank=2))
    assert_refused(load_vilt_checkpoint, fresh, path, r"mm_tokens \[5, 32\] for .*\.apt\.prompts \[6, 32\]")
    fresh = tiny_vilt.make_model()
    petl_ext.attach(fresh, APTConfig(num_prompts=5, rank=2, sites=[r"layer\.0\.attention\.output"]))
    message = assert_refused(load_vilt_checkpoint, fresh, path, "layers that the model does not have there")
    assert "blocks.1.attn.APT.scale" in message
    assert "blocks.0.attn.APT.scale" not in message


def test_a_backbone_checkpoint_leaves_attached_layers_as_they_are(save):
    trained = tiny_vilt.make_model(seed=1)
    path = save(originals.vilt_checkpoint(trained, "vqa_classifier"))
    for config in (*METHODS.values(), DeepPromptConfig(num_prompts=3)):
        fresh = tiny_vilt.make_model()
        attachment = petl_ext.attach(fresh, config)
        before = {name: parameter.clone() for name, parameter in attachment.named_parameters()}
        report = load_vilt_checkpoint(fresh, path)
        for name, parameter in before.items():
            assert torch.equal(fresh.get_parameter(name), parameter)
            assert report.unfilled[name] == "stays as it is: the file holds no such layers"
        attachment.detach()
        assert_equal(fresh, trained)


def test_layers_that_the_file_holds_in_part(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    for model in (trained, fresh):
        petl_ext.attach(model, METHODS["apt"])
    state = originals.vilt_checkpoint(trained, "vqa_classifier", "apt")
    del state["transformer.blocks.1.attn.APT.mm_tokens"]
    lacks = r"file lacks \(1\): vilt\.encoder\.layer\.1\.attention\.output\.apt\.prompts$"
    assert_refused(load_vilt_checkpoint, fresh, save(state), lacks)


EVERY_OUTPUT = {
    "vilt": r"encoder\.layer\.\d+\.(attention\.)?output",
    "meter": r"cross_modal_(text|image)_layers\.\d+\.((cross)?attention\.)?output",
}
# The file's method, and what is attached though its tensors fit: no norm to lack, adapters at all sites.
OTHER_METHODS = [
    ("sequential", lambda sites: DASConfig(bottleneck=3, layer_norm=False)),
    ("sequential", lambda sites: AdapterConfig(kind="parallel", bottleneck=3, layer_norm=False, sites=[sites])),
    ("parallel", lambda sites: AdapterConfig(bottleneck=3, layer_norm=True)),
    ("parallel", lambda sites: DASConfig(bottleneck=3)),
    ("das", lambda sites: AdapterConfig(kind="parallel", bottleneck=3, sites=[sites])),
    ("das", lambda sites: AdapterConfig(bottleneck=3, layer_norm=True)),
    ("apt", lambda sites: AdapterConfig(bottleneck=3)),
    ("sequential", lambda sites: APTConfig(num_prompts=5, rank=2)),
]


@pytest.mark.parametrize(("method", "other"), OTHER_METHODS)
@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_layers_of_another_method_are_refused(save, family, method, other):
    tiny, checkpoint, load = family
    trained, fresh = (tiny.make_model(seed=seed) for seed in (1, 0))
    petl_ext.attach(trained, METHODS[method])
    attachment = petl_ext.attach(fresh, other(EVERY_OUTPUT["vilt" if family is VILT else "meter"]))
    path = save(checkpoint(trained, "vqa_classifier", method))
    its_config = {"apt": "APT", "sequential": "Adapter", "parallel": 'Adapter.*kind="parallel"', "das": "DAS"}[method]
    message = assert_refused(
        load, fresh, path, f"of another method than is attached: the file's are those of {its_config}"
    )
    assert f", the model's of {attachment.config}" in message
    with attachment.disable():
        assert_refused(load, fresh, path, "of another method than is attached")


def test_layers_whose_method_is_not_known_here_are_refused(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    petl_ext.attach(trained, METHODS["sequential"])
    petl_ext.attach(fresh.vilt, METHODS["sequential"])
    path = save(originals.vilt_checkpoint(trained, "vqa_classifier", "sequential"))
    load_vilt_checkpoint(fresh, path)
    assert_equal(fresh, trained)
    inner = tiny_vilt.make_model()
    petl_ext.attach(inner, METHODS["sequential"])
    message = "the model that petl_ext.attach was given"
    assert_refused(load_vilt_checkpoint, inner.vilt, path, message)


def test_the_older_name_of_the_scale_is_refused_until_ignored(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    for model in (trained, fresh):
        petl_ext.attach(model, METHODS["apt"])
    state = originals.vilt_checkpoint(trained, "vqa_classifier", "apt")
    old = [key for key in state if key.endswith("APT.scale")]
    state = {key.replace("APT.scale", "APT.weight"): tensor for key, tensor in state.items()}
    path = save(state)
    assert_refused(load_vilt_checkpoint, fresh, path, r"an older name, .* \(2\): .*0\.attn\.APT\.weight, ")
    report = load_vilt_checkpoint(fresh, path, [key.replace("scale", "weight") for key in old])
    name = "vilt.encoder.layer.0.attention.output.apt.log_scale"
    assert report.unfilled[name] == "its key is ignored on request"
    assert fresh.get_parameter(name).item() == 0
