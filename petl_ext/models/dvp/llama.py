"""DVP on LLaMA."""

import copy
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from petl_ext.models.dvp.adapters import AdapterPlan
from petl_ext.models.dvp.base import DVPModel, with_prompt
from petl_ext.tasks.labels import IGNORED, label_loss

# transformers 5.24 renamed it, in outputs too, and will drop the old name.
CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"


class DVPLlama(DVPModel):
    """DVP on LLaMA: the query is the state of the question's end, whose last state the head reads. The prompt stands
    before the first token, which all text sees; from layer K on, the text's positions are greater by 1.

    The question's end is its first end-of-sequence token or, without one, its last token. Positions count what the
    mask does not hide, so that texts can be padded on either side.

    Without num_labels and from a model with a language modeling head, it continues texts (`generate`).

    `original=True` takes the first token, as the authors' code does, for the end of a question without an
    end-of-sequence token. Their heads for GQA and SNLI-VE start as torch's layers do; here all start as that for VQA.

    With use_adapters, as in all the authors' configurations: on the outputs of all attentions and MLPs, before the
    residual. All norms train.
    """

    language_model_type = "llama"
    parts = ("embed_tokens", "layers", "norm")
    norms = (("layers.", "layernorm"), ("norm.", ""))
    adapters = AdapterPlan(
        sites=r"layers\.\d+\.(self_attn|mlp)",
        reduction=64,
        activation="silu",
        initialize=nn.init.xavier_uniform_,
    )
    num_token_types = 0
    default_sizes: ClassVar[dict] = {"num_heads": 16, "inner_dim": 512}

    @property
    def _layers(self):
        return self._base.layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
        question_end: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: [B, T]; with a filled cache only the new tokens.
            attention_mask: [B, T], with a filled cache those before included; None is all 1.
            pixel_values, visual_features, visual_mask: as in `DVPBert.forward`; none with a filled cache, which holds
                the prompt.
            labels: as in `DVPBert.forward`; without a classifier the tokens [B, T] as in LlamaForCausalLM, -100 where
                none is asked for. The question then ends before the first that is.
            question_end: [B], the index in input_ids of the token whose state is the query. Given an answer without
                labels, it keeps the query from reading it.
            cache: a transformers Cache, empty or as an earlier call with the same insert_layer left it.
            past_key_values: the same, by the name that transformers had for it before 5.24.

        Returns:
            SequenceClassifierOutput with logits [B, L]; without a classifier CausalLMOutputWithPast with logits
            [B, T, vocabulary]. Given labels, with the loss.

        Raises:
            ValueError: a shape does not fit, a sample has no token, or the cache is another insert_layer's.
        """
        cache, visual = self._one_cache(cache, past_key_values), None
        if labels is not None and self.classifier is None and labels.shape != input_ids.shape:
            raise self._wrong(f"labels must be tokens {list(input_ids.shape)}, got {list(labels.shape)}")
        if self._seen(cache):
            self._check_continued(input_ids, attention_mask, cache, (pixel_values, visual_features, visual_mask))
        else:
            self._check_text(input_ids, attention_mask)
            visual = self._visual(input_ids, pixel_values, visual_features, visual_mask)
        if question_end is None and visual is not None:
            question_end = self._question_end(input_ids, attention_mask, labels)
        rows = torch.arange(input_ids.size(0), device=input_ids.device)
        states = self._run(0, self.insert_layer, self._base.embed_tokens(input_ids), attention_mask, cache)
        if visual is not None:
            states = self._insert(states, states[rows, question_end], visual)
        states = self._run(self.insert_layer, None, states, with_prompt(attention_mask), cache)
        states = self._base.norm(states)
        if self.classifier is not None:
            return self._classified(states[rows, question_end + 1], labels)
        return self._worded(states if visual is None else states[:, 1:], labels, cache)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 64, **inputs: Any
    ) -> Tensor:
        """Continues each text with its likeliest next token, again and again, until all have ended.

        Args:
            input_ids, attention_mask: [B, T], padded on either side.
            inputs: pixel_values or visual_features, visual_mask, question_end: `forward`'s.

        Returns:
            The new tokens [B, at most max_new_tokens]; what follows an end-of-sequence token repeats it.
        """
        ends = self._end_tokens(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = DynamicCache(config=self._base.config)
        logits = self(input_ids, mask, cache=cache, **inputs).logits
        last, rows = _last_token(mask), torch.arange(input_ids.size(0), device=input_ids.device)
        tokens = [logits[rows, last].argmax(-1)]
        while len(tokens) < max_new_tokens and not torch.isin(tokens[-1], ends).all():
            mask = torch.cat([mask, mask.new_ones(mask.size(0), 1)], dim=1)
            following = self(tokens[-1][:, None], mask, cache=cache).logits[:, -1].argmax(-1)
            tokens.append(torch.where(torch.isin(tokens[-1], ends), tokens[-1], following))
        return torch.stack(tokens, dim=1)

    def _run(self, first, end, states, attention_mask, cache):
        """The layers from `first` to before `end`; the mask is for all rows that they have seen or see now."""
        layers = self._layers[first:end]
        if len(layers) == 0:
            return states
        llama, seen = self._base, _from_layer(cache, first)
        positions = _positions(states, attention_mask, seen)
        mask = create_causal_mask(llama.config, states, attention_mask, seen)
        cosines_and_sines = llama.rotary_emb(states, position_ids=positions)
        for layer in layers:
            states = layer(
                states,
                attention_mask=mask,
                position_ids=positions,
                use_cache=cache is not None,
                position_embeddings=cosines_and_sines,
                **{CACHE: cache},
            )
        return states

    def _worded(self, states, labels, cache):
        """The output of the language modeling head."""
        logits, loss = self.language_model.lm_head(states), None
        if labels is not None:
            loss = label_loss(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _question_end(self, input_ids, attention_mask, labels):
        """[B], the index of the token whose state is the query."""
        takes_part = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.classifier is None and labels is not None:
            answered = labels != IGNORED
            before = takes_part * (answered.cumsum(1) == 0)
            return _last_token(before)
        ends = torch.isin(input_ids, self._end_tokens(input_ids)) & (takes_part != 0)
        first = ends.int().argmax(1)
        if self.options["original"]:
            return first
        return torch.where(ends.any(1), first, _last_token(takes_part))

    def _end_tokens(self, input_ids):
        ends = self._base.config.eos_token_id
        return torch.tensor([] if ends is None else ends, device=input_ids.device, dtype=input_ids.dtype).reshape(-1)

    def _one_cache(self, cache, past_key_values):
        if cache is not None and past_key_values is not None:
            raise self._wrong("cache and past_key_values are two names of one argument, but both were given")
        given = past_key_values if cache is None else cache
        if given is not None and self.classifier is not None:
            raise self._wrong("a cache is for language modeling, but num_labels made a classifier")
        return given

    def _seen(self, cache):
        """How many rows layer K has seen."""
        return 0 if cache is None else cache.get_seq_length(self.insert_layer)

    def _check_continued(self, input_ids, attention_mask, cache, images):
        if any(given is not None for given in images):
            raise self._wrong("the cache holds the prompt already, but an image is given again")
        layer = self.insert_layer
        lengths = [cache.get_seq_length(i) for i in range(self.num_layers)]
        text = lengths[layer] - 1
        if lengths != [text] * layer + [text + 1] * (self.num_layers - layer):
            raise self._wrong(
                f"the cache must be that of insert_layer {layer}, one row more from it on, got {lengths} rows"
            )
        shape = (input_ids.size(0), text + input_ids.size(1))
        if attention_mask is not None and attention_mask.shape != shape:
            raise self._wrong(
                f"attention_mask must cover {text} tokens before and {input_ids.size(1)} now, {list(shape)}, "
                f"got {list(attention_mask.shape)}"
            )

    def _checked_labels(self, num_labels):
        if num_labels is None and hasattr(self.language_model, "lm_head"):
            return None
        if num_labels is None:
            raise self._wrong("num_labels is needed where language_model has no lm_head")
        return super()._checked_labels(num_labels)

    def _freeze(self):
        super()._freeze()
        if self.classifier is None:
            self.language_model.lm_head.requires_grad_(not self.options["use_adapters"])

    @staticmethod
    def _head_width(dim):
        return dim // 8


def _from_layer(cache, first):
    """The cache as the layers from `first` on see it: transformers takes its length from the first entry."""
    if cache is None or first == 0:
        return cache
    part = copy.copy(cache)
    part.layers = cache.layers[first:]
    return part


def _positions(states, attention_mask, cache):
    """[B or 1, rows of states]: how many rows that are not hidden stand before each."""
    length = states.size(1)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    before = 0 if cache is None else cache.get_seq_length()
    return torch.arange(before, before + length, device=states.device)[None]


def _last_token(mask):
    """[B], the index of the last 1 of each row; 0 where there is none."""
    counted = torch.arange(mask.size(1), device=mask.device) * (mask != 0)
    return counted.argmax(1)
