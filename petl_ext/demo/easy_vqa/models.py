"""The models of the demo's rows."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from petl_ext.demo.dvp.models import CONSTANT, TYPE_STD, MeanPromptLayer

LORA_RANK = 16
LORA_TARGETS = r".*\.(query|key|value|dense|[qkvo]_proj|gate_proj|up_proj|down_proj)"


def make_dvp(texts, layer, num_labels, visual_dim, **options):
    """DVP on the language model from `layer` on, whose query begins by telling the texts from each other.

    Args:
        texts: `ReadTexts`.
        options: of the DVP class.
    """
    model = texts.language_model.dvp_class(
        texts.upper_part(layer), num_labels=num_labels, visual_dim=visual_dim, dropout=0.0, **options
    )
    model.language_model.get_input_embeddings().requires_grad_(False)
    for table in model.type_embeddings:
        nn.init.normal_(table.weight, std=TYPE_STD)
    for above, prompt in enumerate(model.visual_prompts):
        _begin_apart(prompt.query, texts.queries(layer + above))
    return model.train()


@torch.no_grad()
def _begin_apart(query, states):
    """Sets the linear layer so that over `states` [texts, D] each number of its outputs has mean 0 and standard
    deviation 1 (arXiv 1511.06856); it stays as it is where they are all the same."""
    outputs = query(states)
    spread = outputs.std(0)
    if (spread > CONSTANT * outputs.abs().mean()).all():
        query.weight.div_(spread[:, None])
        query.bias.copy_(-query.weight @ states.mean(0))


def give_mean_prompt(model):
    """Makes a DVP model the control: its prompt is the mean of the tokens, which no question guides."""
    model.visual_prompts[0] = _mean_like(model.visual_prompts[0])


def _mean_like(layer):
    mean = MeanPromptLayer(layer.query.in_features, layer.num_heads, layer.value.in_features, layer.value.out_features)
    mean.load_state_dict(layer.state_dict())
    mean.query.requires_grad_(False)
    mean.key.requires_grad_(False)
    return mean


def give_lora(model):
    """Freezes a DVP model's language model and puts LoRA on all its linear layers."""
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, model.language_model)
    model.language_model.get_input_embeddings().requires_grad_(False)


class AllTokens(nn.Module):
    """A DVP model's language model and head, which reads all visual tokens, projected, in front of its text.

    Without visual_dim it reads text alone.
    """

    def __init__(self, dvp, reads_first, visual_dim=None):
        super().__init__()
        self.language_model, self.classifier = dvp.language_model, dvp.classifier
        self.reads_first = reads_first
        dim = self.language_model.get_input_embeddings().weight.size(1)
        self.project = None if visual_dim is None else nn.Linear(visual_dim, dim)

    def forward(self, input_ids, attention_mask, visual_features=None, question_end=None):
        """As the DVP model's: an output with logits [B, L]."""
        words = self.language_model.get_input_embeddings()(input_ids)
        prompts = words[:, :0] if self.project is None else self.project(visual_features)
        count = prompts.size(1)
        states = self.language_model(
            inputs_embeds=torch.cat([prompts, words], dim=1),
            attention_mask=F.pad(attention_mask, (count, 0), value=1),
        ).last_hidden_state
        end = 0 if self.reads_first else question_end
        return SequenceClassifierOutput(logits=self.classifier(states[torch.arange(len(words)), count + end]))
