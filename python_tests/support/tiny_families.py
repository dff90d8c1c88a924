"""Small models with random weights of every family, and inputs for them."""

from typing import NamedTuple

import tiny_meter
import tiny_vilt
import torch
from diffusers import UNet2DConditionModel
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

DIM, WORDS, TOKENS = 32, 50, 6
SHARED = {"num_attention_heads": 4, "intermediate_size": 48, "vocab_size": WORDS, "hidden_size": DIM}
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}


class Family(NamedTuple):
    """A model of one family.

    Attributes:
        new: makes the model without weights of its own from the number of layers in each stack.
        stacks: dotted names of the lists of layers, in the order in which the layers are numbered.
    """

    new: object
    stacks: tuple

    def make(self, *layers, seed=0):
        torch.manual_seed(seed)
        model = self.new(*layers).eval()
        for parameter in model.parameters():
            spread = 0.1 if parameter.dim() == 1 else 0.3
            torch.nn.init.normal_(parameter, mean=parameter.flatten()[0].item() * (parameter.dim() == 1), std=spread)
        return model


def _bert(config_class, model_class):
    return lambda layers: model_class(
        config_class(**SHARED, num_hidden_layers=layers, max_position_embeddings=12, pad_token_id=0)
    )


def _t5(encoder, decoder):
    sizes = {"d_model": DIM, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": WORDS, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=encoder, num_decoder_layers=decoder))


def _llama(layers):
    config = LlamaConfig(**SHARED, num_hidden_layers=layers, num_key_value_heads=2, max_position_embeddings=32)
    return LlamaForCausalLM(config)


def _clip_text_config(layers):
    return CLIPTextConfig(**SHARED, num_hidden_layers=layers, max_position_embeddings=12, eos_token_id=49)


def _clip(text, vision):
    config = CLIPConfig(projection_dim=20)
    config.text_config = _clip_text_config(text)
    config.vision_config = CLIPVisionConfig(**VISION, num_hidden_layers=vision)
    return CLIPModel(config)


def _clip_vision(layers):
    return CLIPVisionModel(CLIPVisionConfig(**VISION, num_hidden_layers=layers))


def _meter(text, image):
    assert text == image
    return tiny_meter.make_model(num_fusion_layers=text)


def _unet(layers):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=layers,
        cross_attention_dim=DIM,
        attention_head_dim=8,
        norm_num_groups=8,
    )


# Those whose layers can be skipped.
FAMILIES = {
    "vilt": Family(lambda layers: tiny_vilt.make_model(num_hidden_layers=layers), ("vilt.encoder.layer",)),
    "meter": Family(_meter, ("meter.cross_modal_text_layers", "meter.cross_modal_image_layers")),
    "bert": Family(_bert(BertConfig, BertModel), ("encoder.layer",)),
    "roberta": Family(_bert(RobertaConfig, RobertaModel), ("encoder.layer",)),
    "clip": Family(_clip, ("text_model.encoder.layers", "vision_model.encoder.layers")),
    "clip_text_model": Family(lambda layers: CLIPTextModel(_clip_text_config(layers)), None),
    "clip_vision_model": Family(_clip_vision, None),
    "t5": Family(_t5, ("encoder.block", "decoder.block")),
    "llama": Family(_llama, ("model.layers",)),
}
ALL_FAMILIES = FAMILIES | {"unet": Family(_unet, None)}
LAYERS = 3


def make_model(family, layers=LAYERS):
    found = ALL_FAMILIES[family]
    return found.make(*[layers] * (len(found.stacks) if found.stacks else 1))


def make_inputs(model, batch=2):
    """Words, where the model reads words with half of the first text padded, and images where it sees images."""
    if isinstance(model, UNet2DConditionModel):
        return _unet_inputs(batch)
    family = model.config.model_type
    if family in ("vilt", "meter"):
        return {"vilt": tiny_vilt, "meter": tiny_meter}[family].make_inputs(model, batch=batch)
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, TOKENS, dtype=torch.long)
    mask[0, TOKENS // 2 :] = 0
    words = torch.randint(3, WORDS - 1, (batch, TOKENS), generator=generator)
    text = {"input_ids": words, "attention_mask": mask}
    image = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if family == "t5":
        text["decoder_input_ids"] = words.flip(0)[:, :4]
    return {"clip_vision_model": image, "clip": text | image}.get(family, text)


def _unet_inputs(batch):
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.arange(batch) + 3,
        "encoder_hidden_states": torch.randn(batch, TOKENS, DIM, generator=generator),
    }


def run(model, inputs):
    """The logits, the sample, or the last hidden states where there is no head."""
    torch.manual_seed(2)
    output = model(**inputs)
    for name in ("logits", "logits_per_image", "sample", "last_hidden_state"):
        if name in output:
            return output[name]
    raise AssertionError(output.keys())
