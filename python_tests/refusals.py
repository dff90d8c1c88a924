"""Combinations of other people's libraries that refuse each other, found by asking the one that refuses."""

import json

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


def _refusal(who, whom, ask):
    """Who refuses whom, in what words; None where it does not."""
    try:
        ask()
    except (ValueError, ImportError) as error:
        return f"{who.__name__} {who.__version__} refuses {whom.__name__} {whom.__version__}: {error}"
    return None


def _ask_for_accelerate():
    transformers.training_args.TrainingArguments(output_dir="unused", use_cpu=True).device  # noqa: B018


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

# For the adapter methods of transformers' own models, which ask at each call.
needs_add_adapter = pytest.mark.skipif(TRANSFORMERS_REFUSES_PEFT is not None, reason=str(TRANSFORMERS_REFUSES_PEFT))


if __name__ == "__main__":
    print(json.dumps([refusal for refusal in REFUSALS if refusal]))
