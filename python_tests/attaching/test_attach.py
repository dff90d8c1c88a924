"""Every method on every model class, through the life that a model leads: training, copies, files, processes."""

import copy
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tiny_vilt import CONFIGS, KEEP, LABELS, make_inputs, make_model, new_keys, randomize, run, snapshot
from transformers import BertConfig, BertModel, Trainer, TrainingArguments, ViltForQuestionAnswering
from transformers_names import enable_checkpointing
from two_processes import in_two_processes

import petl_ext
from petl_ext import APTConfig, ClassifierOnlyConfig, DASConfig
from petl_ext.attaching.families import FAMILIES

every_method = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.row or config.method)
every_model = pytest.mark.parametrize("model_class", KEEP, ids=lambda model_class: model_class.__name__)
methods_with_layers = pytest.mark.parametrize(
    "config", [config for config in CONFIGS if config.row], ids=lambda config: config.row
)


def runs(config, name):
    """Whether the parameter of that name takes part in the model's output."""
    skipped = any(f"layer.{index}." in name for index in getattr(config, "skip", ()))
    return (".bypass." in name) == skipped


def attached(config, model_class=ViltForQuestionAnswering, seed=0):
    model = make_model(model_class, seed)
    return model, petl_ext.attach(model, config, KEEP[model_class])


@every_model
@every_method
def test_disable_and_detach_give_the_backbone_bit_for_bit(config, model_class):
    model = make_model(model_class)
    next(model.parameters()).requires_grad_(False)
    inputs, before, output = make_inputs(model), snapshot(model), run(model, make_inputs(model))
    attachment = petl_ext.attach(model, config, KEEP[model_class])
    kept = {name: tensor.clone() for name, tensor in attachment.named_parameters() if name in before[0]}
    randomize(attachment)
    with torch.no_grad():
        for name, tensor in kept.items():
            model.get_parameter(name).copy_(tensor)
    assert torch.equal(run(model, inputs), output) == (not attachment.sites)
    with attachment.disable():
        assert torch.equal(run(model, inputs), output)
    assert torch.equal(run(model, inputs), output) == (not attachment.sites)
    attachment.detach()
    assert torch.equal(run(model, inputs), output)
    assert snapshot(model) == before


@every_model
@every_method
def test_only_new_and_kept_parameters_train(config, model_class):
    model, attachment = attached(config, model_class)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(attachment.parameters(), lr=1.0)
    run(model, make_inputs(model)).square().sum().backward()
    optimizer.step()
    trained = {name for name, _ in attachment.named_parameters() if runs(config, name)}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    if config.trains_all:
        assert trained == before.keys()
    else:
        new = {name for name in trained if name not in make_model(model_class).state_dict()}
        assert changed == trained
        assert trained - new == {n for n in before if any(f".{entry}." in f".{n}" for entry in KEEP[model_class])}
    assert changed <= trained


@every_model
@every_method
def test_backbone_keys_stay_and_new_ones_are_the_layers(config, model_class):
    keys = list(make_model(model_class).state_dict())
    model, _ = attached(config, model_class)
    added = [name for name in model.state_dict() if name not in keys]
    assert [name for name in model.state_dict() if name in keys] == keys
    assert len(added) == len(new_keys(config))
    assert all(name.endswith(tuple(new_keys(config))) for name in added)


@every_model
@every_method
def test_save_and_load_are_exact(config, model_class, tmp_path):
    model, attachment = attached(config, model_class)
    randomize(attachment)
    attachment.save(tmp_path / "saved")
    fresh = make_model(model_class)
    loaded = petl_ext.load(fresh, tmp_path / "saved")
    assert snapshot(fresh) == snapshot(model)
    assert (loaded.config, loaded.keep, loaded.sites) == (attachment.config, attachment.keep, attachment.sites)
    assert torch.equal(run(fresh, make_inputs(fresh)), run(model, make_inputs(model)))
    again, other = attached(config, model_class)
    assert petl_ext.load(again, tmp_path / "saved") is other
    assert snapshot(again) == snapshot(model)


@every_model
@every_method
def test_copies_are_independent(config, model_class):
    model, attachment = attached(config, model_class)
    twin = copy.deepcopy(model)
    inputs, output = make_inputs(model), run(model, make_inputs(model))
    randomize(attachment)
    assert twin.petl_attachment.model is twin
    assert torch.equal(run(twin, inputs), output)
    assert not torch.equal(run(model, inputs), output)
    twin.petl_attachment.detach()
    with attachment.disable():
        assert hasattr(model, "petl_attachment")
    assert not hasattr(twin, "petl_attachment")


@every_model
@every_method
def test_a_pickled_model_keeps_its_attachment(config, model_class, tmp_path):
    model, attachment = attached(config, model_class)
    randomize(attachment)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert snapshot(again) == snapshot(model)
    assert torch.equal(run(again, make_inputs(model)), run(model, make_inputs(model)))
    again.petl_attachment.detach()
    assert again.state_dict().keys() == make_model(model_class).state_dict().keys()


@pytest.mark.parametrize("reentrant", [False, True])
@methods_with_layers
def test_gradient_checkpointing_gives_the_same_gradients(config, reentrant):
    model, attachment = attached(config)
    model.train()
    calls = []
    model.vilt.encoder.layer[1].intermediate.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=reentrant)
        model.zero_grad()
        run(model, make_inputs(model)).square().sum().backward()
        gradients.append([p.grad.clone() for name, p in attachment.named_parameters() if runs(config, name)])
    assert len(calls) == 3  # once without checkpointing, twice with it
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@methods_with_layers
def test_autocast_trains_float32_layers(config):
    model, attachment = attached(config)
    randomize(attachment)
    expected = run(model, make_inputs(model))
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, make_inputs(model))
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    output.float().square().sum().backward()
    for parameter in (p for name, p in attachment.named_parameters() if runs(config, name)):
        assert parameter.dtype is torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@methods_with_layers
def test_layers_take_the_dtype_and_mode_of_their_site(config):
    model = make_model().to(torch.bfloat16).train()
    attachment = petl_ext.attach(model, config)
    layers = [module for site in attachment.sites for module in model.get_submodule(site).modules()]
    assert all(layer.training for layer in layers)
    assert all(parameter.dtype is torch.bfloat16 for parameter in attachment.parameters())


@methods_with_layers
def test_the_encoder_compiles_in_one_graph(config):
    model, attachment = attached(config)
    randomize(attachment)
    encoder = model.vilt.encoder
    hidden = torch.randn(2, 7, model.config.hidden_size)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden).last_hidden_state, encoder(hidden).last_hidden_state)
    with attachment.disable():
        torch.testing.assert_close(compiled(hidden).last_hidden_state, encoder(hidden).last_hidden_state)


@methods_with_layers
def test_layers_start_from_the_seed(config):
    first, second = (dict(attached(config)[1].named_parameters()) for _ in range(2))
    for name, parameter in first.items():
        assert parameter.isfinite().all()
        assert torch.equal(parameter, second[name])


def apt_by_hand(layer, x, y):
    """out = exp(log_scale) * (y + rowmax(s) * (s prompts)), s = relu(x (prompts + (prompts down^T) up^T)^T)."""
    keys = layer.prompts + layer.prompts @ layer.down.T @ layer.up.T
    scores = (x @ keys.T).clamp(min=0)
    gate = scores.max(dim=-1, keepdim=True).values
    return layer.log_scale.exp() * (y + gate * (scores @ layer.prompts))


def test_apt_in_vilt_is_the_formula():
    model, attachment = attached(CONFIGS[0])
    randomize(attachment)
    seen = []
    for block in model.vilt.encoder.layer:
        block.layernorm_before.register_forward_hook(lambda _, args, output: seen.append(output))
        block.attention.output.dense.register_forward_hook(lambda _, args, output: seen.append(output))
        block.attention.output.register_forward_hook(lambda _, args, output: seen.append(output))
    run(model, make_inputs(model))
    for block in model.vilt.encoder.layer:
        x, y, output, *seen = seen
        expected = apt_by_hand(block.attention.output.apt, x, y)
        assert not torch.allclose(output, y, rtol=0.1)
        torch.testing.assert_close(output, expected)


def test_apt_in_a_post_norm_encoder_named_by_sites():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertModel(BertConfig(vocab_size=50, max_position_embeddings=10, **sizes)).eval()
    attachment = petl_ext.attach(bert, APTConfig())
    assert attachment.sites == tuple(f"encoder.layer.{index}.attention.output" for index in range(3))
    attachment.detach()
    bert.config.model_type = "my_bert"
    with pytest.raises(ValueError, match=r"none of the families with sites for apt, .*layer.0.attention.output") as e:
        petl_ext.attach(bert, APTConfig())
    with mock.patch.dict(FAMILIES):
        exec("\n".join(line.removeprefix("To make its family known: ") for line in str(e.value).split("\n")[1:]))
        assert len(petl_ext.attach(bert, APTConfig()).sites) == 3
    bert.petl_attachment.detach()
    attachment = petl_ext.attach(bert, APTConfig(num_prompts=5, sites=[r"layer\.[12]\.attention\.output"]))
    assert attachment.sites == ("encoder.layer.1.attention.output", "encoder.layer.2.attention.output")
    randomize(attachment)
    output = bert.encoder.layer[1].attention.output
    heads, x = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    expected = output.LayerNorm(apt_by_hand(output.apt, x, output.dense(heads)) + x)
    torch.testing.assert_close(output(heads, x), expected)


def test_hooks_of_a_site_survive_attaching_and_detaching():
    model, calls = make_model(), []
    model.vilt.encoder.layer[0].attention.output.register_forward_hook(lambda *_: calls.append(1))
    attachment = petl_ext.attach(model, CONFIGS[0])
    run(model, make_inputs(model))
    attachment.detach()
    run(model, make_inputs(model))
    assert len(calls) == 2


def test_keep_reaches_buffers_and_every_name_of_a_shared_weight(tmp_path):
    model = make_model()
    model.classifier.append(torch.nn.BatchNorm1d(LABELS))
    model.alias = model.classifier[0]
    attachment = petl_ext.attach(model, ClassifierOnlyConfig(), keep=["alias", "classifier.4"])
    trained = dict(attachment.named_parameters())
    assert list(trained) == ["classifier.4.weight", "classifier.4.bias", "alias.weight", "alias.bias"]
    assert trained["alias.weight"] is model.classifier[0].weight
    model.train()
    run(model, make_inputs(model))
    attachment.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "petl_weights.safetensors")
    assert torch.equal(saved["classifier.4.running_mean"], model.classifier[4].running_mean)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.0.weight",
        "classifier.0.bias",
        "classifier.4.weight",
        "classifier.4.bias",
    }


class Questions(torch.utils.data.Dataset):
    def __init__(self, model, size=8):
        inputs = make_inputs(model, batch=size)
        self.columns = inputs | {"labels": torch.eye(LABELS)[torch.arange(size) % LABELS]}

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def train(config, folder, resume=None):
    model, attachment = attached(config)
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(model, arguments, train_dataset=Questions(model)).train(resume_from_checkpoint=resume)
    return model, attachment


@methods_with_layers
def test_the_trainer_trains_and_resumes(config, tmp_path):
    start = attached(config)[0].state_dict()
    model, attachment = train(config, tmp_path)
    trained = {name for name, _ in attachment.named_parameters() if runs(config, name)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]) == (name not in trained)
    resumed, _ = train(config, tmp_path, str(tmp_path / "checkpoint-2"))
    assert snapshot(resumed) == snapshot(model)


def gradients_of(model, attachment, seed):
    """Of one step, or with layers that can be skipped of several, each of which skips other ones."""
    skips = [[0], [1], []] if hasattr(attachment, "skip") else [None]
    gradients = {}
    for skip in skips:
        if skip is not None:
            attachment.skip(skip)
        model.zero_grad()
        run(model, make_inputs(attachment.model, seed)).square().mean().backward()
        for name, parameter in attachment.named_parameters():
            # Where ranks share gradients, a parameter that did not run has one of zeros.
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[f"{name} with {skip} skipped"] = found.clone()
    return gradients


def data_parallel_gradients(rank, config):
    model, attachment = attached(config)
    changes = config.row == "bypass"
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=changes)
    return gradients_of(wrapped, attachment, seed=10 + rank)


@pytest.mark.parametrize("config", [CONFIGS[0], DASConfig(bottleneck=6)], ids=lambda config: config.row)
def test_data_parallel_ranks_share_gradients(config):
    shared = in_two_processes(data_parallel_gradients, config)
    alone = [gradients_of(*attached(config), seed=10 + rank) for rank in range(2)]
    for name, gradient in shared[0].items():
        assert torch.equal(gradient, shared[1][name])
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2)


def test_shared_kept_weights_are_given_once():
    model = make_model()
    model.alias = model.classifier[0]
    attachment = petl_ext.attach(model, ClassifierOnlyConfig(), keep=["alias", "classifier"])
    parameters = list(attachment.parameters())
    assert len(parameters) == len(set(map(id, parameters))) == len(list(model.classifier.parameters()))
