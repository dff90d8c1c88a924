"""What trains of a DVP model, with what gradients, and with which tools."""

import pytest
import torch
from dvp_checks import ADAPTER_PLACES, every_family, every_layer, filled, with_and_without_adapters
from peft import LoraConfig, get_peft_model
from tiny_dvp import LABELS, make_inputs, make_model
from transformers import Trainer, TrainingArguments
from transformers_names import CHECKPOINTING_ARGUMENT, disable_checkpointing, enable_checkpointing

# What trains of the language model, written out for one layer of each stack.
NORMS = {
    "bert": [
        f"encoder.layer.{{i}}.{part}.LayerNorm.{name}"
        for part in ("attention.output", "output")
        for name in ("weight", "bias")
    ],
    "t5": [
        *(f"encoder.block.{{i}}.layer.{part}.layer_norm.weight" for part in (0, 1)),
        *(f"decoder.block.{{i}}.layer.{part}.layer_norm.weight" for part in range(3)),
        "encoder.final_layer_norm.weight",
        "decoder.final_layer_norm.weight",
    ],
    "llama": [
        "model.layers.{i}.input_layernorm.weight",
        "model.layers.{i}.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
}
ADAPTER_PARTS = ("down", "down_bias", "up", "up_bias")
UNUSED = {"bert": "pooler.", "t5": "lm_head.", "llama": "lm_head."}


def expected_to_train(model, family):
    """Names in the language model."""
    adapted = {f"{place}.adapter.{part}" for place in filled(ADAPTER_PLACES[family]) for part in ADAPTER_PARTS}
    if model.options["use_adapters"]:
        return adapted | filled(NORMS[family])
    names = [name for name, _ in model.language_model.named_parameters()]
    return {name for name in names if not name.startswith(UNUSED[family])}


@with_and_without_adapters
@every_layer
@every_family
def test_gradients_reach_exactly_what_trains(family, insert_layer, use_adapters):
    model = make_model(family, insert_layer=insert_layer, use_adapters=use_adapters)
    model(**make_inputs(model), labels=torch.arange(3)).loss.backward()
    own = {name for name, _ in model.named_parameters() if not name.startswith("language_model.")}
    expected = own | {f"language_model.{name}" for name in expected_to_train(model, family)}
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == expected
    assert {name for name, p in parameters.items() if p.grad is not None} == expected
    # Softmax takes out what is added to all keys alike, and a decoder of one row has nothing to weigh.
    nothing = [name for name in expected if not parameters[name].grad.any()]
    assert "visual_prompts.0.key.bias" in nothing
    single = "SelfAttention.q", "SelfAttention.k", "SelfAttention.relative_attention_bias"
    assert all(
        name.endswith("key.bias") or (family == "t5" and "decoder" in name and any(part in name for part in single))
        for name in nothing
    ), nothing


@with_and_without_adapters
@every_family
def test_gradient_checkpointing(family, use_adapters):
    model = make_model(family, insert_layer=1, use_adapters=use_adapters, dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.train()
    inputs = make_inputs(model)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=torch.arange(3)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    norm = next(module for module in model._layers[0].modules() if "Norm" in type(module).__name__)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    enable_checkpointing(model.language_model)
    checkpointed = gradients()
    assert len(calls) == 2, "the layer is computed again in backward"
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])
    disable_checkpointing(model.language_model)
    gradients()
    assert len(calls) == 3


@every_family
def test_the_trainer_trains_and_resumes(family, tmp_path):
    inputs = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in make_inputs(make_model(family)).items()
    }
    data = [{**{name: tensor[i] for name, tensor in inputs.items()}, "labels": torch.tensor(i)} for i in range(3)]

    def trained(steps, resume=None):
        model = make_model(family, insert_layer=1, use_adapters=True).float()
        options = {"per_device_train_batch_size": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        arguments = TrainingArguments(
            tmp_path,
            max_steps=steps,
            save_steps=2,
            **{CHECKPOINTING_ARGUMENT: True},
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        Trainer(model, arguments, train_dataset=data).train(resume)
        return model

    whole, resumed = trained(4), trained(4, resume=str(tmp_path / "checkpoint-2"))
    state = make_model(family, insert_layer=1, use_adapters=True).float().state_dict()
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name])
    changed = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, state[name])}
    trains = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert changed <= trains and "visual_prompts.0.query.weight" in changed


@every_family
def test_a_training_step_under_autocast(family):
    model = make_model(family, insert_layer=1, use_adapters=True).float().train()
    inputs = make_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=torch.rand(3, LABELS)).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_lora_trains_in_the_visual_prompt_and_merges():
    torch.manual_seed(0)
    model = get_peft_model(
        make_model("bert", insert_layer=1).float(), LoraConfig(target_modules=["query", "key", "value"])
    )
    inputs = make_inputs(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["classifier", "type_embeddings.0", "visual_prompts.0"])
def test_peft_trains_parts_of_the_model(part):
    config = LoraConfig(target_modules=["self.query"], modules_to_save=[part])
    model = get_peft_model(make_model("bert", insert_layer=1).float(), config)
    inputs = make_inputs(model)
    model(**inputs).logits.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if ".modules_to_save." in name}
    assert trained and any(p.grad is not None and p.grad.any() for p in trained.values())
