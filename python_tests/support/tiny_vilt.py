"""Small ViLT models with random weights, inputs for them, and what the tests of petl_ext.attach do to both."""

import torch
from transformers import (
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltModel,
)

from petl_ext import (
    AdapterConfig,
    APTConfig,
    ClassifierOnlyConfig,
    ClassTokenConfig,
    DASConfig,
    DeepPromptConfig,
    FullTuningConfig,
    attach,
)

TEXT, IMAGE, PATCH, DIM, LAYERS, LABELS = 6, 32, 8, 32, 2, 5
TOKENS = TEXT + 1 + (IMAGE // PATCH) ** 2

# What of the backbone trains in every method.
KEEP = {
    ViltForQuestionAnswering: ["classifier", "vilt.pooler"],
    ViltForImagesAndTextClassification: ["classifier"],
    ViltForImageAndTextRetrieval: ["rank_output"],
    ViltModel: ["pooler"],
}
CONFIGS = [
    APTConfig(num_prompts=5, rank=2),
    DeepPromptConfig(num_prompts=3),
    AdapterConfig(bottleneck=6),
    AdapterConfig(kind="parallel", bottleneck=6),
    DASConfig(bottleneck=6, skip=[0]),
    ClassifierOnlyConfig(),
    FullTuningConfig(),
    ClassTokenConfig(),
    APTConfig(num_prompts=5, rank=2, train_scale=False, class_token=True),
    DASConfig(bottleneck=6, skip=[0], class_token=True),
]
_ADAPTER = ["down", "down_bias", "up", "up_bias"]
_NORMED = [*_ADAPTER, "norm_weight", "norm_bias"]
# What each layer of the model gets, by row of the table of sites.
NEW_KEYS = {
    "apt": ["attention.output.apt." + name for name in ("prompts", "down", "up", "log_scale")],
    "deep_prompts": ["attention.attention.deep_prompts.prompts"],
    "sequential_adapter": [f"{site}.adapter.{name}" for site in ("attention.output", "output") for name in _ADAPTER],
    "parallel_adapter": [f"attention.output.adapter.{name}" for name in _NORMED],
    "bypass": [f"{layer}.{name}" for layer in ("bypass", "adapter", "output.adapter") for name in _NORMED],
}
CLASS_TOKEN = "embeddings.text_embeddings.class_token.vector"


def new_keys(config):
    """How the names of the tensors end that the method adds."""
    of_layers = [f"layer.{i}.{key}" for i in range(LAYERS) for key in NEW_KEYS.get(config.row, [])]
    has_token = config.class_token or config.row == "class_token"
    return [*of_layers, CLASS_TOKEN] if has_token else of_layers


def make_model(model_class=ViltForQuestionAnswering, seed=0, **changes):
    sizes = {
        "hidden_size": DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 50,
        "max_position_embeddings": 10,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "num_labels": LABELS,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.2,
    }
    if model_class is ViltForImagesAndTextClassification:
        sizes |= {"num_images": 2, "modality_type_vocab_size": 3}
    torch.manual_seed(seed)
    model = model_class(ViltConfig(**sizes | changes)).eval()
    # Biases and norms start at 0 and 1, with which many a mistake would change nothing.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter[0].item(), std=0.1)
    return model


def attached(config=CONFIGS[0], keep=("classifier",)):
    model = make_model()
    return model, attach(model, config, keep)


def make_inputs(model, seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)
    images = (2,) if isinstance(model, ViltForImagesAndTextClassification) else ()
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[0, TEXT // 2 :] = 0
    return {
        "input_ids": torch.randint(1, 50, (batch, TEXT), generator=generator),
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, *images, 3, IMAGE, IMAGE, generator=generator),
    }


def run(model, inputs):
    """The logits, or the pooled output where there is no head. ViLT shuffles patches with the global generator."""
    torch.manual_seed(2)
    output = model(**inputs)
    return output.logits if "logits" in output else output.pooler_output


def randomize(attachment):
    """Makes what trains differ from its initial value by much, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def snapshot(model):
    """All that attach and load may change in a model, to compare with ==."""
    return (
        {name: None if tensor.is_meta else contents(tensor) for name, tensor in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)},
        hasattr(model, "petl_attachment"),
    )


def contents(tensor):
    """Shape, dtype and bytes of a tensor, to compare with ==."""
    return tensor.shape, tensor.dtype, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
