"""What transformers names otherwise in later versions; the old names warn, and will be gone."""

import inspect
from dataclasses import fields

from transformers import LlamaForCausalLM, PreTrainedModel, TrainingArguments

# Since 5.24; of outputs too.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
# Since 5.23.
CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
CHECKPOINTING_ARGUMENT = (
    f"{CHECKPOINTING}_checkpointing"
    if f"{CHECKPOINTING}_checkpointing" in {field.name for field in fields(TrainingArguments)}
    else "gradient_checkpointing"
)


def enable_checkpointing(model, **options):
    """Options are those of torch's checkpoint, such as use_reentrant."""
    getattr(model, f"{CHECKPOINTING}_checkpointing_enable")(
        **{f"{CHECKPOINTING}_checkpointing_kwargs": options or None}
    )


def disable_checkpointing(model):
    getattr(model, f"{CHECKPOINTING}_checkpointing_disable")()
