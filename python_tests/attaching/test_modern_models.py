"""The models that people use, by one body: every method on each, and decoders with their caches."""

from itertools import combinations

import model_table
import modern_models
import pytest
import torch
import transformers
from model_table import METHODS, PAGE, TOWERS, config_of
from modern_models import TINY, make, make_inputs, run
from skipping_checks import cache_error
from tiny_vilt import randomize, snapshot
from transformers.cache_utils import DynamicLayer

import petl_ext
from petl_ext import DASConfig

every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", TINY)


@pytest.fixture(autouse=True)
def is_there(request):
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name is not None and modern_models.lacking(name):
        pytest.skip(modern_models.lacking(name))


@every_method
@every_model
def test_a_method_on_a_model(name, method, tmp_path):
    """Works, or is refused with the model unchanged and the reason in docs/models.md."""
    inputs = make_inputs(name)
    try:
        model, attachment = model_table.attached(name, method)
    except ValueError as error:
        reason = model_table.reason_of(error)
        assert reason and f"{method}: {reason}." in PAGE.read_text(encoding="utf-8")
        return
    with attachment.disable():
        before = run(model, inputs)
    randomize(attachment)
    check_gradients(model, attachment, inputs)
    with torch.no_grad():
        changed = run(model, inputs)
        assert changed.isfinite().all() and not torch.equal(changed, before)
        with attachment.disable():
            assert torch.equal(run(model, inputs), before)
        attachment.save(tmp_path / "saved")
        again = make(name)
        petl_ext.load(again, tmp_path / "saved")
        assert torch.equal(run(again, inputs), changed)
        attachment.detach()
        assert torch.equal(run(model, inputs), before) and torch.equal(run(make(name), inputs), before)


def check_gradients(model, attachment, inputs):
    """Every new parameter gets one; of a `DASConfig` while one layer after the other is skipped."""
    for index in range(len(getattr(attachment, "layers", (None,)))):
        if isinstance(attachment.config, DASConfig):
            attachment.skip([index], decodes=False)
        run(model, inputs).square().sum().backward()
    without = [name for name, p in attachment.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad] == []
    model.zero_grad()


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_that_can_take_nothing_is_refused_with_the_line_to_copy(name):
    model = make(name)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"vision tower takes no APTConfig: .*MultiheadAttention.* write sites=\["
    ) as error:
        petl_ext.attach(model, config_of("APT"))
    assert str(error.value).endswith(f"sites={TOWERS[name]}") and snapshot(model) == before


DECODERS = [name for name in modern_models.TEXT if modern_models.TEXT[name][1].endswith(("ForCausalLM", "LMHeadModel"))]
HALVES = ["t5", "mt5", "umt5", "bart", "mbart", "whisper"]
# PaliGemma's prompts see each other both ways and cannot come one by one; BLIP-2 needs an image in every call.
SEEING = [name for name in modern_models.SEEING if name not in ("paligemma", "blip-2", "blip", "bridgetower", "vilt")]


def decoding_model(name):
    """A model whose decoder's layers can be skipped, and the set of the types of its cache's slots."""
    model = make(name)
    tower = "decoder" if name in HALVES else "language"
    attachment = petl_ext.attach(model, config_of("DAS", sites=tower))
    randomize(attachment)
    stack = model.get_submodule(attachment.layers[0].rpartition(".")[0])
    configs = (vars(module)["config"] for module in stack.modules() if "config" in vars(module))
    types = next((config.layer_types for config in configs if getattr(config, "layer_types", None)), None)
    return model, attachment, types or ["full_attention"] * len(stack)


@pytest.mark.parametrize("name", DECODERS + HALVES + SEEING)
@torch.no_grad()
def test_each_running_layer_takes_a_slot_of_its_own_type_in_the_cache(name):
    model, attachment, types = decoding_model(name)
    words = torch.randint(5, 50, (1, 11), generator=torch.Generator().manual_seed(3))
    decoded = "decoder_input_ids" if name in HALVES else "input_ids"
    given = {key: value[:1] for key, value in make_inputs(name).items() if key != decoded} if name in HALVES else {}
    with attachment.disable():
        if cache_error(model, given, decoded, words) > 1e-4:
            pytest.skip(
                f"the cache of the bare {type(model).__name__} is wrong in transformers {transformers.__version__}"
            )
    served = 0
    for skip in [list(each) for size in range(3) for each in combinations(range(len(attachment.layers)), size)]:
        running = {types[index] for index in range(len(types)) if index not in skip}
        if running < set(types):
            with pytest.raises(ValueError, match=r"no layer of [\w.]+ that is \w+_attention would run"):
                attachment.skip(skip)
            continue
        attachment.skip(skip)
        assert cache_error(model, given, decoded, words) <= 1e-4, skip
        served += 1
    assert served >= 3


WAYS = {"beams": {"num_beams": 2}, "static": {"cache_implementation": "static"}, "greedy": {}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "mistral", "qwen2", "gemma2", "gemma3_text", "gemma4_text", "cohere2", "mixtral", "qwen3_5"),
        *("llava", "gemma4", "t5", "bart"),
    ],
)
@torch.no_grad()
def test_generation_with_skipped_layers(name, way):
    """With the first text padded on the left, past the window of the models that have one."""
    if way == "static" and name in HALVES:
        pytest.skip("transformers gives these no static cache by itself")
    model, attachment, _ = decoding_model(name)
    attachment.skip([1])
    words = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(words)
    if name not in HALVES:
        mask[0, :2] = 0
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    inputs = {"input_ids": words.masked_fill(mask == 0, 0), "attention_mask": mask, **settings}
    slow = model.generate(**inputs, use_cache=False, num_beams=WAYS[way].get("num_beams", 1))
    assert torch.equal(model.generate(**inputs, **WAYS[way]), slow)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "mixtral", "llava", "t5"])
@torch.no_grad()
def test_prompt_lookup_with_skipped_layers(name):
    """Words that repeat themselves are proposed and checked together, and the cache gives back what was wrong."""
    try:
        DynamicLayer().crop(-1)
    except TypeError:
        pytest.skip(f"transformers {transformers.__version__} cannot crop a cache with a slot that no layer uses")
    model, attachment, _ = decoding_model(name)
    attachment.skip([1])
    words = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    plain = model.generate(words, **settings)
    steps = len(calls)
    assert torch.equal(model.generate(words, **settings, prompt_lookup_num_tokens=3), plain)
    assert len(calls) - steps <= steps


def test_the_page_of_models_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == model_table.page(model_table.entries())


def test_as_many_models_as_promised():
    rows = [cells for cells, _ in model_table.entries().values()]
    assert len({cells[0] for cells in rows}) == len(rows) == len(TINY)
    counts = [sum(bool(cells[column].strip()) for cells in rows) for column, _ in model_table.COLUMNS]
    assert counts[0] >= 50 and min(counts[1:3]) >= 45 and counts[3] >= 40
