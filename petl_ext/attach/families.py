"""Where each method goes in each model family: one line per family and method.

A family is a Hugging Face `config.model_type`. Its entries are regular expressions over the dotted names of the
method's candidate sites, matched from a dot or from the start to the end of the name.
"""

from petl_ext.attach.deep_prompts import DeepPromptSelfAttention
from petl_ext.attach.self_output import APTSelfOutput

# The class that a site's module becomes, by method; methods that are not here add nothing to the model.
SITE_CLASSES = {"apt": APTSelfOutput, "deep_prompts": DeepPromptSelfAttention}

FAMILIES = {
    "vilt": {
        "apt": r"encoder\.layer\.\d+\.attention\.output",
        "deep_prompts": r"encoder\.layer\.\d+\.attention\.attention",
    },
}


def family_of(model):
    """The name of the one family that `model` or modules inside it belong to, or None."""
    configs = (getattr(module, "config", None) for module in model.modules())
    found = {getattr(config, "model_type", None) for config in configs} & FAMILIES.keys()
    return found.pop() if len(found) == 1 else None
