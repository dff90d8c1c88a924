"""The language models of the demo, whose lowest layers are read out once.

Layers below the prompt are frozen and see no picture, and there are about a hundred different questions: their states
at the layer where the prompt enters are a table, in which a batch looks them up.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, BertTokenizerFast

from petl_ext.demo.packages import GGUF, MINILM, SMOLLM2
from petl_ext.models import DVPBert, DVPLlama, DVPModel


@dataclass(frozen=True)
class LanguageModel:
    """One that the demo can prompt.

    Attributes:
        name: for the report.
        packages: that hold it.
        read: returns (tokenizer, model), in float32, without dropout and without a head of its own.
        dvp_class: DVP on it.
        layers: where the prompt is tried.
        adapters_only: whether DVP trains adapters in it in every row, as the authors do for LLaMA.
        reads_first: whether query and answer come from the first token's state, else from the last's.
    """

    name: str
    description: str
    packages: tuple
    read: Callable
    dvp_class: type[DVPModel]
    layers: tuple
    adapters_only: bool
    reads_first: bool


def read_minilm():
    """all-MiniLM-L6-v2: without dropout, since trainings this short do not overfit."""
    MINILM.check()
    folder = MINILM.folder / "model"
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertModel.from_pretrained(folder, **dropouts, local_files_only=True)
    return BertTokenizerFast.from_pretrained(folder), model


def read_smollm2():
    """SmolLM2-135M-Instruct, from 4 bits: (tokenizer, LlamaForCausalLM)."""
    SMOLLM2.check()
    GGUF.check()
    named = {"gguf_file": next(iter(SMOLLM2.files)), "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.folder, **named)
    return tokenizer, AutoModelForCausalLM.from_pretrained(SMOLLM2.folder, dtype=torch.float32, **named)


def _read_bare_smollm2():
    tokenizer, model = read_smollm2()
    return tokenizer, model.model


LANGUAGE_MODELS = {
    "minilm": LanguageModel(
        name="MiniLM",
        description="all-MiniLM-L6-v2, a BERT of width 384 with 6 layers",
        packages=(MINILM,),
        read=read_minilm,
        dvp_class=DVPBert,
        layers=(0, 1, 2, 3, 4, 5),
        adapters_only=False,
        reads_first=True,
    ),
    "smollm2": LanguageModel(
        name="SmolLM2",
        description="SmolLM2-135M-Instruct, a LLaMA of width 576 with 30 layers",
        packages=(SMOLLM2, GGUF),
        read=_read_bare_smollm2,
        dvp_class=DVPLlama,
        layers=(24, 25, 26, 27, 28, 29),
        adapters_only=True,
        reads_first=False,
    ),
}


@dataclass(frozen=True)
class ReadTexts:
    """What a language model makes of all texts.

    Attributes:
        model: the whole, frozen.
        input_ids, mask: [texts, T], padded on the right.
        states: {layer: states [texts, T, D] before it}.
    """

    language_model: LanguageModel
    model: nn.Module
    input_ids: Tensor
    mask: Tensor
    states: dict

    @classmethod
    def of(cls, language_model, texts):
        """Reads all texts once."""
        tokenizer, model = language_model.read()
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokens = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = model.eval().requires_grad_(False)(**inputs, output_hidden_states=True).hidden_states
        chosen = {layer: states[layer] for layer in language_model.layers}
        return cls(language_model, model, inputs["input_ids"], inputs["attention_mask"], chosen)

    @property
    def ends(self):
        """Index of the last token of each text."""
        return self.mask.sum(1) - 1

    def queries(self, layer):
        """The states [texts, D] of which a prompt before this layer is asked."""
        rows = torch.arange(len(self.mask))
        return self.states[layer][rows, 0 if self.language_model.reads_first else self.ends]

    def upper_part(self, layer):
        """The language model from this layer on: a new one, which looks the states below up by `rows_of`."""
        table = nn.Embedding.from_pretrained(self.states[layer].flatten(0, 1).clone())
        embedded = "embeddings" if self.language_model.reads_first else "embed_tokens"
        whole, layers = self.model, _layers(self.model)
        kept = {id(whole.get_submodule(embedded)): table} | {id(lower): lower for lower in layers[:layer]}
        part = copy.deepcopy(whole, kept)
        if self.language_model.reads_first:
            part.embeddings = LookedUp(table)
            part.encoder.layer = part.encoder.layer[layer:]
        else:
            part.embed_tokens = table
            part.layers = part.layers[layer:]
        part.config.num_hidden_layers, part.config.use_cache = len(layers) - layer, False
        return part

    def rows_of(self, texts):
        """What `upper_part` takes for these texts [B]: input_ids and attention_mask [B, T]."""
        mask = self.mask[texts]
        length = int(mask.sum(1).max())
        rows = texts[:, None] * self.mask.size(1) + torch.arange(length)
        return {"input_ids": rows, "attention_mask": mask[:, :length]}


class LookedUp(nn.Module):
    """In place of a BERT's embeddings: states from a table, to which nothing is added."""

    def __init__(self, table):
        super().__init__()
        self.word_embeddings = table

    def forward(self, input_ids=None, inputs_embeds=None, **_):
        return self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds


def _layers(model):
    return model.encoder.layer if isinstance(model, BertModel) else model.layers
