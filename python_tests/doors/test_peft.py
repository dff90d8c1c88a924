"""APT as a method of PEFT: every family, several adapters, kernels, precisions, training, saving."""

import copy
import io
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_checks import LAYERS, SIZES, close, make, outputs, randomize
from tiny_families import ALL_FAMILIES, make_inputs, make_model, run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer
from transformers_names import enable_checkpointing
from vilt_training import Questions, make_arguments

import petl_ext
from petl_ext.nn.apt import apt_keys
from petl_ext.peft import APTConfig, APTTunerLayer

# How many attentions each family has with one layer in each of its stacks.
SITES = {"meter": 4, "clip": 2, "t5": 3, "unet": 8}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family(family, tmp_path):
    model = make_model(family, 1)
    inputs, keys, before = make_inputs(model), list(model.state_dict()), outputs(model, make_inputs(model))
    tuned = get_peft_model(model, APTConfig(**SIZES))
    layers = [module for module in tuned.modules() if isinstance(module, APTTunerLayer)]
    assert len(layers) == SITES.get(family, 1)
    assert all("petl_apt_" in name for name, p in tuned.named_parameters() if p.requires_grad)
    randomize(tuned)
    after = outputs(tuned, inputs)
    assert not close(after, before)

    run(tuned.train(), inputs).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in tuned.parameters())
    tuned.zero_grad()
    with tuned.disable_adapter():
        assert torch.equal(outputs(tuned, inputs), before)
    assert torch.equal(outputs(copy.deepcopy(tuned), inputs), after)
    assert torch.equal(outputs(pickled(tuned), inputs), after)
    tuned.save_pretrained(tmp_path)
    for arguments in ({"adapter_name": "other"}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(make_model(family, 1), tmp_path, **arguments)
        assert close(outputs(loaded, inputs), after)
    backbone = tuned.unload()
    assert list(backbone.state_dict()) == keys
    assert torch.equal(outputs(backbone, inputs), before)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["vilt", "bert", "clip_vision_model", "t5", "unet"])
def test_same_as_attached(family):
    """`petl_ext.attach` puts the same layers into the same places."""
    inputs = make_inputs(make_model(family, LAYERS))
    attached, tuned = make_model(family, LAYERS), make(family)
    petl_ext.attach(attached, petl_ext.APTConfig(**SIZES))
    randomize(tuned)
    values = iter(p for name, p in tuned.named_parameters() if "petl_apt_" in name)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if ".apt." in name:
                parameter.copy_(next(values))
    assert next(values, None) is None
    assert close(outputs(tuned, inputs), outputs(attached, inputs))


class Calls(TorchDispatchMode):
    """The names of the ops of petl_ext that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "petl_ext":
            self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def test_the_fused_kernel_runs():
    model = make(dropout=0.1)
    inputs = make_inputs(model)
    with Calls() as calls:
        outputs(model, inputs)
    assert calls.names == ["apt_forward"] * LAYERS
    with Calls() as calls:
        dropped = run(model.train(), inputs)
        dropped.sum().backward()
    assert calls.names == ["apt_forward"] * LAYERS + ["apt_backward"] * LAYERS
    for layer in model.modules():
        if isinstance(layer, APTTunerLayer):
            layer.petl_options["default"]["dropout"] = 0.0
    with Calls() as calls:
        out = run(model, inputs)
        out.sum().backward()
    assert calls.names == ["apt_forward"] * LAYERS + ["apt_backward"] * LAYERS
    assert not torch.equal(out, dropped)


def test_frozen_keys(monkeypatch):
    model = make().eval()
    inputs = make_inputs(model)
    model.add_adapter("second", APTConfig(**SIZES))
    computed = []
    monkeypatch.setattr("petl_ext.nn.apt.apt_keys", lambda *tensors: computed.append(tensors) or apt_keys(*tensors))
    layers = [module for module in model.modules() if isinstance(module, APTTunerLayer)]
    with torch.no_grad():
        before = run(model, inputs)
        assert len(computed) == LAYERS
        for layer in layers:
            layer.freeze()
        assert len(computed) == 3 * LAYERS
        assert torch.equal(run(model, inputs), before) and len(computed) == 3 * LAYERS
        randomize(model)
        assert not close(run(model, inputs), before) and len(computed) == 4 * LAYERS
        for layer in layers:
            layer.freeze()
        model.train().eval()
        run(model, inputs)
        assert len(computed) == 7 * LAYERS
        for layer in layers:
            layer.freeze()
    model.delete_adapter("second")
    with pytest.raises(RuntimeError, match="frozen keys pass no gradient on"):
        run(model, inputs)


def test_several_adapters():
    model = make()
    inputs = make_inputs(model)
    model.add_adapter("second", APTConfig(num_prompts=3, activation="softmax"))
    model.add_adapter("third", APTConfig(**SIZES, layers_to_transform=[1]))
    randomize(model)
    first = outputs(model, inputs)
    assert all(".default" in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("second")
    second = outputs(model, inputs)
    assert all(".second" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not close(first, second)
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.active_adapters) == (LAYERS, ["second"])
    model.set_adapter("third")
    assert sum(p.requires_grad for p in model.parameters()) == 4, "layer 0 has no third adapter"
    third = outputs(model, inputs)

    # Several active ones change the output one after the other.
    model.base_model.set_adapter(["second", "third"])
    layers = [module for module in model.modules() if isinstance(module, APTTunerLayer)]
    x, y = torch.randn(2, 3, layers[1].dense.in_features)
    both = layers[1].apt(x, y)
    model.set_adapter("second")
    one = layers[1].apt(x, y)
    model.set_adapter("third")
    torch.testing.assert_close(layers[1].apt(x, one), both)
    assert torch.equal(layers[0].apt(x, y), y)
    model.delete_adapter("second")
    assert torch.equal(outputs(model, inputs), third)
    model.set_adapter("default")
    assert torch.equal(outputs(model, inputs), first)
    with pytest.raises(ValueError, match="adapter_names, one adapter per sample, is not supported"):
        model(**inputs, adapter_names=["default", "third"])


def test_what_is_saved(tmp_path):
    backbone = make_model("vilt", LAYERS)
    inputs = make_inputs(backbone)
    keys, before = list(backbone.state_dict()), outputs(backbone, inputs)
    model = get_peft_model(backbone, APTConfig(**SIZES, modules_to_save=["classifier"]))
    model.add_adapter("second", APTConfig(**SIZES, modules_to_save=["classifier"]))
    randomize(model)
    model.set_adapter("second")
    with torch.no_grad():
        for parameter in model.base_model.model.classifier.modules_to_save["second"].parameters():
            parameter += 1
    model.save_pretrained(tmp_path)
    folder = tmp_path / "second"
    names = [f"vilt.encoder.layer.{i}.attention.output.petl_apt_{n}" for i in range(LAYERS) for n in TENSORS]
    names += [name for name in get_peft_model_state_dict(model, adapter_name="second") if "classifier" in name]
    # PEFT 0.19 writes the other adapters' tensors too, under their names.
    saved = [name for name in peft.utils.load_peft_weights(folder) if not name.endswith(".default")]
    assert {name.removeprefix("base_model.model.") for name in names} == {
        name.removeprefix("base_model.model.") for name in saved
    }
    assert len([name for name in names if "classifier" in name]) == 6
    for card in (tmp_path / "README.md", folder / "README.md"):
        assert card.read_text(encoding="utf-8").count("import petl_ext.peft") == 1
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("import petl_ext.peft") == 1
    loaded = PeftModel.from_pretrained(make_model("vilt", LAYERS), folder, adapter_name="new")
    assert close(outputs(loaded, inputs), outputs(model, inputs))
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), before)
    assert list(model.unload().state_dict()) == keys


TENSORS = ("prompts", "down", "up", "log_scale")


def test_a_folder_needs_the_import(tmp_path):
    """What PEFT says without it, which the model card explains."""
    APTConfig().save_pretrained(tmp_path)
    script = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as error:
    assert error.args == ("PETL_APT",)
else:
    raise AssertionError("PEFT knows the method without petl_ext")
import petl_ext
petl_ext.peft
assert type(PeftConfig.from_pretrained({str(tmp_path)!r})) is petl_ext.peft.APTConfig
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_adapters_in_float32_on_a_model_in_bfloat16():
    model = get_peft_model(make_model("llama", LAYERS).bfloat16(), APTConfig(**SIZES))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    inputs = make_inputs(model)
    output = run(model, inputs)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    same = get_peft_model(make_model("llama", LAYERS).bfloat16(), APTConfig(**SIZES), autocast_adapter_dtype=False)
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        run(make("llama"), inputs).float().sum().backward()


@pytest.mark.parametrize("family", ["bert", "clip_vision_model"])
def test_compiled_without_graph_breaks(family):
    model = make(family)
    inputs = make_inputs(model)
    randomize(model)
    expected = run(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["vilt", "llama"])
def test_gradient_checkpointing(family, reentrant):
    model = make(family)
    inputs = make_inputs(model)
    randomize(model)
    expected = gradients(model, inputs)
    base = model.base_model.model
    enable_checkpointing(base, use_reentrant=reentrant)
    base.enable_input_require_grads()
    checkpointed = gradients(model.train(), inputs)
    assert checkpointed.keys() == expected.keys() and len(expected) == 4 * LAYERS
    for name, gradient in checkpointed.items():
        torch.testing.assert_close(gradient, expected[name])


def gradients(model, inputs):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    run(model, inputs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_trainer_resumes_where_it_was(tmp_path):
    def trainer(folder, **changes):
        torch.manual_seed(0)
        model = make(modules_to_save=["classifier"])
        data = Questions(model)
        arguments = make_arguments(
            folder,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            logging_strategy="steps",
            logging_steps=1,
            **changes,
        )
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    whole = trainer(tmp_path / "whole", eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in checkpoint.iterdir()}
    assert not (checkpoint / "model.safetensors").exists()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    best = min((log for log in whole.state.log_history if "eval_loss" in log), key=lambda log: log["eval_loss"])
    assert whole.state.best_global_step == best["step"]
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make_model("vilt", LAYERS), whole.state.best_model_checkpoint)
    inputs = make_inputs(loaded)
    assert close(outputs(loaded, inputs), outputs(whole.model, inputs))


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
