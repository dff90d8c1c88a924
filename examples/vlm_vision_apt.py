"""APT on the vision tower of a language model that sees, and on nothing else of it.

    python examples/vlm_vision_apt.py                                    # a tiny LLaVA with random weights, offline
    python examples/vlm_vision_apt.py --model llava-hf/llava-1.5-7b-hf   # a checkpoint; the task below stays a toy

The task: say which way the stripes of a picture run, by one of two words. --output gets what `petl_ext.load` reads.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

import petl_ext

ANSWERS = (3, 4)  # words of the tiny model: stripes that lie, stripes that stand
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}


def tiny_model():
    """A LLaVA around a CLIP and a LLaMA, with random weights."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, **IMAGE},
        text_config={"model_type": "llama", "max_position_embeddings": 64, **TEXT},
        image_token_index=63,
    )
    return LlavaForConditionalGeneration(config)


def load_model(options):
    if options.model is None:
        return tiny_model()
    return AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)


def draw_stripes(model, rows, generator):
    """(inputs, answers): pictures [rows, 3, H, W] of stripes, and one prompt that ends where the answer is to come."""
    vision = model.config.vision_config
    answers = torch.randint(0, 2, (rows,), generator=generator)
    line = torch.arange(vision.image_size).div(4, rounding_mode="floor").remainder(2) * 2.0 - 1
    lying = line[:, None].expand(vision.image_size, -1)
    pictures = torch.where(answers[:, None, None].bool(), lying.T, lying)
    pictures = pictures[:, None] + 0.3 * torch.randn(rows, 3, *lying.shape, generator=generator)
    num_tokens = (vision.image_size // vision.patch_size) ** 2
    prompt = torch.tensor([1, *[model.config.image_token_id] * num_tokens, 5])
    inputs = {"input_ids": prompt.expand(rows, -1), "pixel_values": pictures}
    return inputs, torch.tensor(ANSWERS)[answers]


def answer_loss(model, inputs, answers):
    return F.cross_entropy(model(**inputs).logits[:, -1].float(), answers)


def train(model, groups, steps, generator):
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        answer_loss(model, *draw_stripes(model, 16, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model, seed):
    inputs, answers = draw_stripes(model, 64, torch.Generator().manual_seed(seed))
    return (model(**inputs).logits[:, -1].argmax(-1) == answers).double().mean().item()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint that LlavaForConditionalGeneration reads")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    model = load_model(options)
    config = petl_ext.APTConfig(num_prompts=options.num_prompts, sites="vision")
    attachment = petl_ext.attach(model, config)
    print(attachment.report())
    before = accuracy(model, seed=1)
    train(
        model,
        attachment.parameter_groups(vision=options.learning_rate),
        options.steps,
        torch.Generator().manual_seed(0),
    )
    after = accuracy(model, seed=1)
    with attachment.disable():
        disabled = accuracy(model, seed=1)
    print(f"accuracy {before:.1%} before, {after:.1%} after training, {disabled:.1%} with the new layers disabled")
    if options.output:
        attachment.save(options.output)
    return {"before": before, "after": after, "attachment": attachment}


if __name__ == "__main__":
    main()
