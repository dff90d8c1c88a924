"""Layers that are skipped, on every family: against smaller models that never had them, and through a model's life."""

import copy
import dataclasses
import gc
import weakref
from itertools import combinations

import pytest
import tiny_meter
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import DIM, FAMILIES, LAYERS, make_inputs, make_model, run
from tiny_vilt import randomise, snapshot
from transformers import BertConfig, BertModel
from transformers_names import CACHE, enable_checkpointing

import petl_ext
from petl_ext import APTConfig, DASConfig
from petl_ext.counting import count_macs
from petl_ext.ops import adapter_reference

every_family = pytest.mark.parametrize("family", FAMILIES)
SKIPS = ([0], [1], [0, 1], [LAYERS - 1])


def stacks(family):
    return FAMILIES[family].stacks or ("encoder.layers",)


def attached(family, **options):
    model = make_model(family)
    return model, petl_ext.attach(model, DASConfig(**{"bottleneck": 4} | options))


def without_layers(model, family, skipped):
    """The model made anew with fewer layers, and given the weights of those that remain."""
    kept = {stack: [i for i in range(LAYERS) if f"{stack}.{i}" not in skipped] for stack in stacks(family)}
    small = FAMILIES[family].make(*map(len, kept.values()))
    weights = model.state_dict()
    for stack, indices in kept.items():
        layers = {name: weights.pop(name) for name in list(weights) if name.startswith(f"{stack}.")}
        for new, old in enumerate(indices):
            for name in [name for name in layers if name.startswith(f"{stack}.{old}.")]:
                weights[name.replace(f"{stack}.{old}.", f"{stack}.{new}.")] = layers[name]
        table = f"{stack}.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights.update({name: layers[name] for name in layers if name == table})
    small.load_state_dict(
        {
            name: tensor
            for name, tensor in weights.items()
            if "relative_attention_bias" not in name or ".0.layer.0." in name
        }
    )
    return small


class Passing(torch.nn.Module):
    def forward(self, hidden_states, *arguments, **named):
        return hidden_states


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@every_family
def test_a_bypass_that_passes_leaves_the_smaller_model(family, skip):
    model = make_model(family)
    several = len(stacks(family)) > 1
    layers = [f"{stack}.{index}" for stack in stacks(family) for index in skip][several:]  # unequal in two stacks
    if family == "meter":  # its two stacks are of one length
        expected = copy.deepcopy(model)
        for name in layers:
            stack, _, index = name.rpartition(".")
            expected.get_submodule(stack)[int(index)] = Passing()
    else:
        expected = without_layers(model, family, layers)
    attachment = petl_ext.attach(model, DASConfig(bottleneck=0, zero_init=True))
    attachment.skip(layers)
    inputs = make_inputs(model)
    torch.testing.assert_close(run(model, inputs), run(expected, inputs))


@every_family
def test_all_layers_can_be_skipped(family):
    model = make_model(family)
    attachment = petl_ext.attach(model, DASConfig(bottleneck=0, zero_init=True))
    attachment.skip(attachment.layers)
    ends = {}
    for stack in stacks(family):
        first, *_, last = model.get_submodule(stack)
        first.register_forward_pre_hook(lambda _, arguments, stack=stack: ends.setdefault((stack, "in"), arguments[0]))
        last.register_forward_hook(lambda _, __, output, stack=stack: ends.setdefault((stack, "out"), output))
    run(model, make_inputs(model))
    for stack in stacks(family):
        output = ends[stack, "out"]
        assert torch.equal(output if torch.is_tensor(output) else output[0], ends[stack, "in"])


@every_family
def test_a_skipped_layer_is_its_bypass(family):
    model, attachment = attached(family)
    randomise(attachment)
    attachment.skip([0, len(attachment.layers) - 1])
    seen = []
    for index in attachment.skipped:
        layer = model.get_submodule(attachment.layers[index])
        layer.register_forward_hook(lambda layer, arguments, output: seen.append((layer, arguments[0], output)))
    run(model, make_inputs(model))
    assert len(seen) == 2
    for layer, x, output in seen:
        own_norm = {"t5": "layer.0.layer_norm", "llama": "input_layernorm"}.get(family)
        bypass = layer.bypass
        norm = {} if own_norm else {"norm_weight": bypass.norm_weight, "norm_bias": bypass.norm_bias}
        normed = layer.get_submodule(own_norm)(x) if own_norm else x
        expected = adapter_reference(
            normed, bypass.down, bypass.down_bias, bypass.up, bypass.up_bias, residual=x, **norm
        )
        assert (bypass.norm_weight is None) == bool(own_norm)
        torch.testing.assert_close(output if torch.is_tensor(output) else output[0], expected)
        assert not torch.allclose(expected, x, atol=0.1)


@every_family
def test_skipping_ends_where_it_began(family):
    model, attachment = attached(family)
    randomise(attachment)
    inputs = make_inputs(model)
    before, output = snapshot(model), run(model, inputs)
    attachment.skip([0, 1])
    assert attachment.skipped == (0, 1) and attachment.config.skip == (0, 1)
    assert not torch.equal(run(model, inputs), output)
    attachment.skip([1])
    attachment.skip([])
    assert snapshot(model) == before
    assert torch.equal(run(model, inputs), output)


@torch.no_grad()  # attention takes another path where a bias requires gradients
@every_family
def test_disable_and_detach_restore_the_backbone(family):
    model = make_model(family)
    inputs = make_inputs(model)
    before, output, indices = snapshot(model), run(model, inputs), layer_indices(model)
    attachment = petl_ext.attach(model, DASConfig(bottleneck=4))
    randomise(attachment)
    attachment.skip([0])
    skipped = run(model, inputs)
    with attachment.disable(), attachment.disable():
        assert torch.equal(run(model, inputs), output)
        assert layer_indices(model) == indices
    assert attachment.skipped == (0,)
    with pytest.raises(KeyError), attachment.disable():
        raise KeyError
    assert attachment.skipped == (0,)
    assert torch.equal(run(model, inputs), skipped)
    attachment.detach()
    assert torch.equal(run(model, inputs), output)
    assert snapshot(model) == before
    assert layer_indices(model) == indices
    assert not any("skipped" in vars(module) for module in model.modules())


def layer_indices(model):
    return {name: module.layer_idx for name, module in model.named_modules() if "layer_idx" in vars(module)}


def test_layers_that_replace_others_are_numbered_too():
    model, attachment = attached("llama")
    attachment.skip([0])
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    for skip, number in (([0], 1), ([], 2), ([0, 1], 0)):
        attachment.skip(skip)
        assert model.model.layers[2].self_attn.layer_idx == number


def test_nothing_holds_what_has_been_removed():
    model, attachment = attached("llama", skip=[1])
    removed, kept = (weakref.ref(model.model.layers[i].self_attn) for i in (1, 2))
    attachment.remove_skipped()
    gc.collect()
    assert removed() is None and kept() is not None


@pytest.mark.parametrize("skip", [[0], [0, 1], [1]], ids=str)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_cache_gives_what_the_whole_sequence_gives(family, skip):
    model, attachment = attached(family)
    randomise(attachment)
    first = len(attachment.layers) - LAYERS  # of the decoder
    attachment.skip([first + index for index in skip])
    torch.manual_seed(0)
    words = torch.randint(3, 40, (2, 7))
    name, others = ("decoder_input_ids", {"input_ids": words.flip(1)}) if family == "t5" else ("input_ids", {})
    expected = model(**{name: words}, **others).logits
    cache, steps = None, []
    for step in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
        output = model(**{name: words[:, step]}, **others, **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected)


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
OF_SEVERAL_KINDS = {
    "Gemma2": {"head_dim": 8, "layer_types": [SLIDING, FULL] * 2},
    "Cohere2": {"layer_types": [SLIDING, SLIDING, SLIDING, FULL], "eos_token_id": 1, "bos_token_id": 2},
    "Qwen2": {"layer_types": [FULL, SLIDING, FULL, SLIDING], "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3_5": {
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def attached_with_kinds(name):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "sliding_window": 6,
    }
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**sizes | OF_SEVERAL_KINDS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    sites = [r"model\.layers\.\d+"]
    return model, petl_ext.attach(model, petl_ext.DASConfig(bottleneck=4, bypass_bottleneck=4, sites=sites))


@pytest.mark.parametrize(
    "skip", [list(subset) for size in range(4) for subset in combinations(range(4), size)], ids=str
)
@pytest.mark.parametrize("name", OF_SEVERAL_KINDS)
def test_each_running_layer_takes_a_slot_of_its_own_kind_in_the_cache(name, skip):
    model, attachment = attached_with_kinds(name)
    kinds = OF_SEVERAL_KINDS[name]["layer_types"]
    if {kind for index, kind in enumerate(kinds) if index not in skip} < set(kinds):
        with pytest.raises(ValueError, match=r"no layer of model\.layers that is \w+_attention would run"):
            attachment.skip(skip)
        assert attachment.skipped == ()
        attachment.skip(skip, decodes=False)
        assert attachment.skipped == tuple(skip)
        return
    attachment.skip(skip)
    words = torch.randint(5, 60, (1, 15), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, cache, steps = model(input_ids=words).logits, None, []
        for position in range(words.size(1)):
            output = model(input_ids=words[:, position : position + 1], **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_search_may_draw_what_cannot_decode():
    model = attached_with_kinds("Gemma2")[0]
    search = petl_ext.DepthSearch(model, num_skip=2, interval=1, seed=1)
    words = torch.randint(5, 60, (1, 5))
    drawn = set()
    for _ in range(12):
        drawn.add(search.sample())
        search.update(lambda: model(input_ids=words, labels=words).loss)
    assert {(0, 2), (1, 3)} & drawn


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_is_the_same_with_and_without_a_cache(family):
    model, attachment = attached(family)
    randomise(attachment)
    attachment.skip([0, len(attachment.layers) - LAYERS])
    inputs = {
        "input_ids": make_inputs(model)["input_ids"],
        "max_new_tokens": 6,
        "do_sample": False,
        "min_new_tokens": 6,
    }
    torch.testing.assert_close(model.generate(**inputs, use_cache=True), model.generate(**inputs, use_cache=False))


@every_family
def test_removing_the_skipped_layers(family, tmp_path):
    model, attachment = attached(family)
    randomise(attachment)
    layers = [0, len(attachment.layers) - 1]
    attachment.skip(layers)
    inputs = make_inputs(model)
    expected, keys = run(model, inputs), set(model.state_dict())
    gone = [attachment.layers[index] for index in layers]
    size = sum(p.numel() for name, p in model.named_parameters() if not remains(name, gone))
    total = sum(p.numel() for p in model.parameters())
    attachment.remove_skipped()
    assert torch.equal(run(model, inputs), expected)
    assert set(model.state_dict()) == {name for name in keys if remains(name, gone)}
    assert sum(p.numel() for p in model.parameters()) == total - size
    assert attachment.config.permanent and attachment.skipped == tuple(layers)
    assert all(name in dict(model.named_parameters()) for name, _ in attachment.named_parameters())
    check_it_reloads(family, model, attachment, expected, tmp_path)
    for act in (
        lambda: attachment.skip([]),
        attachment.detach,
        attachment.remove_skipped,
        attachment.disable().__enter__,
    ):
        with pytest.raises(RuntimeError, match=r"the layers \[0, \d\] have been removed for good"):
            act()
    assert torch.equal(run(model, inputs), expected)


def remains(name, gone):
    """Whether a tensor stays: bypasses of the layers that are gone, norms and tables that they still need, the rest."""
    layer = next((layer for layer in gone if name.startswith(f"{layer}.")), None)
    if layer is None:
        return ".bypass." not in name
    rest = name.removeprefix(f"{layer}.")
    return rest.startswith(("bypass.", "input_layernorm", "layer.0.layer_norm")) or "relative_attention_bias" in rest


def check_it_reloads(family, model, attachment, expected, folder):
    inputs = make_inputs(model)
    attachment.save(folder / "saved")
    fresh = make_model(family)
    loaded = petl_ext.load(fresh, folder / "saved")
    assert torch.equal(run(fresh, inputs), expected)
    assert loaded.config == attachment.config
    assert snapshot(fresh)[0] == snapshot(model)[0]
    torch.save(model, folder / "whole.pt")
    assert torch.equal(run(torch.load(folder / "whole.pt", weights_only=False), inputs), expected)
    assert torch.equal(run(copy.deepcopy(model), inputs), expected)
    other = make_model(family)
    petl_ext.attach(other, attachment.config)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(other, inputs), expected)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_a_folder_without_layers_that_does_not_fit_changes_nothing(family, tmp_path):
    attached(family, skip=[0], permanent=True)[1].save(tmp_path / "saved")
    weights = tmp_path / "saved" / "petl_weights.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    model = make_model(family)
    before, indices = snapshot(model), layer_indices(model)
    with pytest.raises(ValueError, match=r"does not fit the model, 1 differences: .*bypass.*: missing"):
        petl_ext.load(model, tmp_path / "saved")
    assert (snapshot(model), layer_indices(model)) == (before, indices)
    assert not any("skipped" in vars(module) for module in model.modules())
    assert petl_ext.attach(model, DASConfig(bottleneck=4)).skipped == ()


def test_saving_and_loading_while_disabled(tmp_path):
    model, attachment = attached("vilt")
    attachment.skip([1])
    with attachment.disable():
        attachment.save(tmp_path / "saved")
        assert attachment.skipped == (1,)
    fresh, other = attached("vilt")
    randomise(other)
    before = snapshot(fresh)
    with other.disable(), pytest.raises(RuntimeError, match="load: the attachment is disabled"):
        petl_ext.load(fresh, tmp_path / "saved")
    assert snapshot(fresh) == before
    assert petl_ext.load(fresh, tmp_path / "saved").skipped == (1,)
    assert torch.equal(run(fresh, make_inputs(fresh)), run(model, make_inputs(model)))


def test_loading_skips_that_there_are_not_changes_nothing(tmp_path):
    attached("vilt")[1].save(tmp_path / "saved")
    path = tmp_path / "saved" / "petl_config.json"
    path.write_text(path.read_text().replace('"skip": []', '"skip": [99]'))
    model, attachment = attached("vilt")
    randomise(attachment)
    before = snapshot(model)
    with pytest.raises(ValueError, match="expected indices below 3"):
        petl_ext.load(model, tmp_path / "saved")
    assert snapshot(model) == before


def test_a_detached_handle_says_so():
    model, attachment = attached("t5")
    attachment.skip([0])
    before = snapshot(make_model("t5"))
    with attachment.disable():
        attachment.detach()
    assert snapshot(model) == before
    assert not any("skipped" in vars(module) for module in model.modules())
    assert "skip=(0,)" in repr(attachment)
    for act in (lambda: attachment.skip([0]), attachment.report, attachment.remove_skipped):
        with pytest.raises(RuntimeError, match="has been detached from T5"):
            act()


def test_t5_lends_its_table_and_takes_it_back():
    model, attachment = attached("t5")
    attentions = [block.layer[0].SelfAttention for block in model.decoder.block]

    def owners():
        return [a.has_relative_attention_bias and hasattr(a, "relative_attention_bias") for a in attentions]

    for skip, expected in (([3], [True, True, False]), ([3, 4], [True, False, True]), ([], [True, False, False])):
        attachment.skip(skip)
        assert owners() == expected
        assert ["relative_attention_bias" in vars(a) for a in attentions] == [False, *expected[1:]]
        assert sum("relative_attention_bias" in name for name in model.state_dict()) == 2


@pytest.mark.parametrize("family", ["vilt", "t5"])
def test_what_is_skipped_is_saved_and_loaded(family, tmp_path):
    model, attachment = attached(family)
    randomise(attachment)
    attachment.skip([0, 2])
    attachment.save(tmp_path / "saved")
    fresh = make_model(family)
    assert petl_ext.load(fresh, tmp_path / "saved").skipped == (0, 2)
    inputs = make_inputs(model)
    assert torch.equal(run(fresh, inputs), run(model, inputs))
    again, other = attached(family)
    other.skip([1])
    assert petl_ext.load(again, tmp_path / "saved") is other and other.skipped == (0, 2)
    assert torch.equal(run(again, inputs), run(model, inputs))
    narrow, _ = attached(family, bottleneck=3)
    before = snapshot(narrow)
    with pytest.raises(ValueError, match="expected the config that is attached"):
        petl_ext.load(narrow, tmp_path / "saved")
    assert snapshot(narrow) == before


@pytest.mark.parametrize("family", ["vilt", "meter", "t5", "llama"])
def test_copies_and_pickles_skip_on_their_own(family, tmp_path):
    model, attachment = attached(family)
    randomise(attachment)
    inputs, whole = make_inputs(model), run(model, make_inputs(model))
    attachment.skip([0])
    skipped = run(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(twin, inputs), skipped)
        twin.petl_attachment.skip([])
        assert torch.equal(run(twin, inputs), whole)
        assert torch.equal(run(model, inputs), skipped)


@every_family
def test_gradients_reach_what_runs_and_nothing_else(family):
    model, attachment = attached(family)
    attachment.skip([1])
    run(model, make_inputs(model)).square().sum().backward()
    layer = attachment.layers[1]
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    running = {
        name for name, _ in attachment.named_parameters() if (".bypass." in name) == name.startswith(f"{layer}.")
    }
    assert graded == running
    assert any(".bypass." in name for name in graded)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["vilt", "meter", "bert", "t5", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model, attachment = attached(family)
    attachment.skip([0])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    calls, gradients = [], []
    model.get_submodule(attachment.layers[1]).register_forward_hook(lambda *_: calls.append(1))
    inner = next(m for m in model.get_submodule(attachment.layers[1]).modules() if isinstance(m, torch.nn.Linear))
    inner.register_forward_hook(lambda *_: calls.append("inner"))
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=reentrant)
        model.zero_grad()
        run(model, make_inputs(model)).square().sum().backward()
        gradients.append([p.grad.clone() for p in attachment.parameters() if p.grad is not None])
    assert calls.count("inner") == 3  # once without checkpointing, twice with it
    assert len(gradients[0]) == len(gradients[1]) >= 4
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_follows_the_skips():
    torch._dynamo.reset()
    model, attachment = attached("bert")
    randomise(attachment)
    inputs = make_inputs(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for skip in ([], [1], [0, 2]):
        attachment.skip(skip)
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, run(model, inputs))


def test_output_attentions_of_a_skipped_vilt_layer():
    model, attachment = attached("vilt")
    attachment.skip([1])
    output = model(**make_inputs(model), output_attentions=True, output_hidden_states=True)
    assert [attentions is None for attentions in output.attentions] == [False, True, False]
    assert len(output.hidden_states) == LAYERS + 1


def test_sites_choose_the_layers_that_can_be_skipped():
    model = make_model("vilt")
    attachment = petl_ext.attach(model, DASConfig(bottleneck=4, sites=[r"layer\.[12]"]))
    assert attachment.layers == ("vilt.encoder.layer.1", "vilt.encoder.layer.2")
    assert len(attachment.sites) == 4
    attachment.skip(["vilt.encoder.layer.2"])
    assert attachment.skipped == (1,)


def test_an_unknown_family_by_its_sites():
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=DIM, num_hidden_layers=3, num_attention_heads=4)).eval()
    bert.config.model_type = "my_bert"
    with pytest.raises(ValueError, match=r"none of the families with sites for das .*Candidates, layers.*layer\.0"):
        petl_ext.attach(bert, DASConfig())
    attachment = petl_ext.attach(bert, DASConfig(sites=[r"encoder\.layer\.\d"]))
    assert attachment.layers == tuple(f"encoder.layer.{index}" for index in range(3))
    assert bert.encoder.layer[0].bypass.down.shape == (192, DIM)
    attachment.skip([0, 2])
    assert bert(input_ids=torch.ones(1, 4, dtype=torch.long)).last_hidden_state.shape == (1, 4, DIM)


class HandMade(torch.nn.Module):
    """A layer of a model of one's own, whose first norm is that of a head."""

    def __init__(self):
        super().__init__()
        self.head_norm = torch.nn.LayerNorm(8)
        self.norm = torch.nn.LayerNorm(DIM)
        self.project = torch.nn.Linear(DIM, DIM)

    def forward(self, hidden_states) -> torch.Tensor:
        return hidden_states + self.project(self.norm(hidden_states))


class Silent(HandMade):
    def forward(self, hidden_states):
        return (super().forward(hidden_states),)


class Normless(torch.nn.Linear):
    def forward(self, hidden_states) -> torch.Tensor:
        return super().forward(hidden_states)


def test_layers_of_ones_own_must_say_what_they_return():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(HandMade() for _ in range(3))
    attachment = petl_ext.attach(model, DASConfig(sites=[r"layers\.\d"], bypass_bottleneck=4, skip=[0]))
    assert model.layers[0].bypass.down.shape == (4, DIM)
    assert model.layers[0](torch.randn(2, 3, DIM)).shape == (2, 3, DIM)
    attachment.detach()
    model.layers[1] = Silent()
    with pytest.raises(ValueError, match=r"pattern 'layers.1'. Candidates, .*declared -> torch.Tensor.*: layers.0, "):
        petl_ext.attach(model, DASConfig(sites=["layers.0", "layers.1"]))
    model.layers[1] = Normless(DIM, DIM)
    with pytest.raises(ValueError, match=r"attach: layers.1: Normless holds no norm"):
        petl_ext.attach(model, DASConfig(sites=[r"layers\.\d"]))


def test_parts_of_a_layer_are_no_layers():
    model = make_model("t5")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"matches nothing in T5.*Candidates, layers .*encoder.block.0, encoder.block.1"
    ):
        petl_ext.attach(model, DASConfig(sites=[r"layer\.\d+"]))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": -1}, "bottleneck must be a positive integer, or 0, got -1"),
        ({"bypass_bottleneck": 0}, "bypass_bottleneck must be a positive integer or None, got 0"),
        ({"skip": [-1]}, r"skip must be a list of the layers' indices, got \[-1\]"),
        ({"skip": 3}, "skip must be a list of the layers' indices, got 3"),
        ({"permanent": True}, "permanent must be False, or True with layers in skip, got True"),
        ({"activation": "tanh"}, "activation must be"),
        ({"sites": ["("]}, "not a regular expression"),
    ],
)
def test_a_wrong_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DASConfig(**options)


def test_wrong_layers_are_refused_and_change_nothing():
    _, attachment = attached("vilt")
    attachment.skip([1])
    for wrong in ([3], [-1], ["vilt.encoder.layer.9"], [True], [1.0]):
        with pytest.raises(ValueError, match="expected indices below 3 or names of layers, got"):
            attachment.skip(wrong)
    for wrong in (1, "vilt.encoder.layer.1"):
        with pytest.raises(ValueError, match="expected a list of indices or names of layers, got"):
            attachment.skip(wrong)
    assert attachment.skipped == (1,)
    attachment.skip([])
    with pytest.raises(ValueError, match="none of the 3 layers is skipped"):
        attachment.remove_skipped()
    with attachment.disable(), pytest.raises(RuntimeError, match="skip: the attachment is disabled"):
        attachment.skip([1])
    fresh = make_model("vilt")
    before = snapshot(fresh)
    with pytest.raises(ValueError, match="expected indices below 3"):
        petl_ext.attach(fresh, DASConfig(skip=[7]))
    assert snapshot(fresh) == before
    with pytest.raises(ValueError, match="nothing in ViltForQuestionAnswering with the pattern 'nowhere'"):
        petl_ext.attach(fresh, DASConfig(sites=["nowhere"]))
    assert snapshot(fresh) == before


def test_a_configuration_can_skip_from_the_start():
    model = make_model("vilt")
    attachment = petl_ext.attach(model, DASConfig(bottleneck=4, skip=[2, 0, 2]))
    assert attachment.skipped == (0, 2)
    removed = make_model("vilt")
    config = dataclasses.replace(attachment.config, permanent=True)
    assert petl_ext.attach(removed, config).config == config
    assert not hasattr(removed.vilt.encoder.layer[0], "attention")


def test_the_report_tells_which_layers_run():
    _, attachment = attached("vilt")
    attachment.skip([1])
    rows = {row.layer: row for row in attachment.report(tokens=10).rows}
    assert rows["vilt.encoder.layer.0.bypass"].reason == "its layer is not skipped"
    assert rows["vilt.encoder.layer.1.adapter"].reason == "its layer is skipped"
    assert rows["vilt.encoder.layer.1.bypass"].macs == 2 * 10 * DIM * 8
    assert rows["vilt.encoder.layer.1.output.adapter"].macs == 0
    assert attachment.report(tokens=10).macs == 3 * 2 * 10 * DIM * 8


def test_what_each_layer_costs_and_its_bypass_saves():
    model, attachment = attached("meter")
    inputs = make_inputs(model, batch=1)
    attachment.skip([4])
    report = attachment.report(inputs=inputs)
    costs = report.layer_costs
    assert report.all_macs == round(costs.ratio([4]) * costs.backbone)
    assert attachment.skipped == (4,) and costs == attachment.layer_costs(inputs)
    assert tuple(costs.layers) == attachment.layers
    with attachment.disable():
        assert costs.backbone == count_macs(model, inputs).total
    for skipped in ([], [1], [0, 3, 5], range(6)):
        attachment.skip(skipped)
        assert count_macs(model, inputs).total == round(costs.ratio(skipped) * costs.backbone)
    text, image = (costs.layers[name][1] for name in (attachment.layers[0], attachment.layers[3]))
    assert (text, image) == (2 * 6 * DIM * 12, 2 * tiny_meter.IMAGE_TOKENS * DIM * 12)
    total = report.all_macs
    assert f"{total:,} in all, {total / costs.backbone:.2%} of the backbone's" in str(report)
    assert "layer that can be skipped" in str(report) and f"{costs.savings[0]:,}" in str(report)
    attachment.remove_skipped()
    removed = attachment.report(inputs=inputs)
    assert removed.layer_costs is None and removed.backbone_macs is None and removed.macs > 0
    with pytest.raises(RuntimeError, match="removed for good"):
        attachment.layer_costs(inputs)


def test_a_skipping_model_takes_no_second_attachment():
    model, _ = attached("vilt")
    with pytest.raises(ValueError, match="already attached"):
        petl_ext.attach(model, APTConfig())
