"""Combinations of other people's libraries that refuse each other, found by asking the one that refuses."""

import json
import tempfile

import accelerate
import diffusers
import diffusers.loaders.peft
import diffusers.utils
import peft
import pytest
import transformers
import transformers.integrations.peft
import transformers.training_args
import transformers.utils


def _words_of(ask):
    """The first line of what is said where it is refused, None where it is not."""
    try:
        ask()
    except (ValueError, ImportError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _refusal(who, whom, ask):
    words = _words_of(ask)
    return words and f"{who.__name__} {who.__version__} refuses {whom.__name__} {whom.__version__}: {words}"


def _ask_for_accelerate():
    transformers.training_args.TrainingArguments(output_dir="unused", use_cpu=True).device  # noqa: B018


def _ask_for_an_image_processor():
    with tempfile.TemporaryDirectory() as folder:
        transformers.CLIPImageProcessorPil().save_pretrained(folder)
        transformers.AutoImageProcessor.from_pretrained(folder)


TRANSFORMERS_REFUSES_PEFT = _refusal(
    transformers,
    peft,
    lambda: transformers.utils.check_peft_version(transformers.integrations.peft.MIN_PEFT_VERSION),
)
REFUSALS = [
    TRANSFORMERS_REFUSES_PEFT,
    _refusal(diffusers, peft, lambda: diffusers.utils.check_peft_version(diffusers.loaders.peft.MIN_PEFT_VERSION)),
    _refusal(transformers, accelerate, _ask_for_accelerate),
]

# transformers 5.17 does without torchvision, but for AutoImageProcessor.
NO_AUTO_IMAGE_PROCESSOR = _words_of(_ask_for_an_image_processor)

# For the adapter methods of transformers' own models, which ask at each call.
needs_add_adapter = pytest.mark.skipif(TRANSFORMERS_REFUSES_PEFT is not None, reason=str(TRANSFORMERS_REFUSES_PEFT))
needs_auto_image_processor = pytest.mark.skipif(
    NO_AUTO_IMAGE_PROCESSOR is not None,
    reason=f"transformers {transformers.__version__}: {NO_AUTO_IMAGE_PROCESSOR}",
)


if __name__ == "__main__":
    print(json.dumps([refusal for refusal in REFUSALS if refusal]))
