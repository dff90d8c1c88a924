"""DVP, dynamic visual prompting (arXiv 2306.00409), on BERT, T5 and LLaMA.

A language model reads text; before its layer K, one query of text pools the tokens of a frozen vision encoder into one
prompt, which goes in front of the text, so that the layers from K on read one row more. B samples, T text tokens,
N visual tokens of width Dv, D the language model's width, L labels.

The layers below K and those from K on are run here rather than by the language model's own forward, because their
masks, positions and caches differ in length.
"""

import copy
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from petl_ext.folder import check_keys, fill, read_files, write_files
from petl_ext.models.dvp_adapters import AdapterPlan, adapter_places, add_adapters, remove_adapters
from petl_ext.models.heads import class_loss, mlp_head, soft_target_loss
from petl_ext.nn import VisualPromptLayer

HEAD_STD = 0.02
IGNORED = -100  # the label of a token that counts for no loss, as in transformers


class Visual(NamedTuple):
    """An image's tokens [B, N, Dv] and which of them take part, bool [B, N], or None for all."""

    features: torch.Tensor
    mask: torch.Tensor | None


class DVPModel(nn.Module):
    """What DVPBert, DVPT5 and DVPLlama have in common.

    The model takes the language model over: it freezes what does not train, and with use_adapters puts adapters into
    it. It runs the vision encoder without gradients and always in eval mode. New layers are made on the device and in
    the dtype of the language model's embeddings.

    Args:
        language_model: a Hugging Face model of the family, with a head of its own or without.
        vision_model: frozen; a module that, given pixel_values, returns an output with last_hidden_state [B, N, Dv],
            class token included, such as CLIPVisionModel. None where `forward` is given visual_features.
        insert_layer: K. It can be changed at any time: `model.insert_layer = 3`.
        num_labels: L. The papers' tasks: 3129 for VQAv2, 1843 for GQA, 3 for SNLI-VE.
        num_heads: of the VisualPromptLayer; None is the authors' choice.
        visual_dim: Dv; None is the vision model's hidden_size.
        inner_dim: the VisualPromptLayer's; None is the authors' choice.
        dropout: on the VisualPromptLayer's attention weights, in training.
        candidates: None for one VisualPromptLayer, whatever K is, or "all" for one for each K, as the search for K
            trains them. DistributedDataParallel then needs find_unused_parameters.
        original: computes what the authors' code does where that seems to be a mistake; each class says what it is.
        use_adapters: DVP_adp, which freezes the language model but for its norms and trains adapters in it. Without,
            all of the language model that runs is trained.

    Attributes:
        options: the arguments but insert_layer, as they were understood.
        num_layers: how many layers the prompt can enter; insert_layer lies in [0, num_layers).
        visual_prompts: a ModuleList of one VisualPromptLayer or, with candidates, of one for each layer.
        type_embeddings: likewise of tables [2, D], added to text and prompt where they meet; empty for LLaMA.
        classifier: the head, or None.

    Raises:
        ValueError: a wrong argument. The language model has not changed.
    """

    family: ClassVar[str]
    parts: ClassVar[tuple]  # of the base model that run
    norms: ClassVar[tuple]  # (part, what else is in the names of the parameters that train beside adapters)
    adapters: ClassVar[AdapterPlan]
    num_token_types: ClassVar[int] = 2
    default_sizes: ClassVar[dict] = {"num_heads": 12, "inner_dim": None}

    def __init__(
        self,
        language_model,
        vision_model=None,
        *,
        insert_layer=0,
        num_labels=None,
        num_heads=None,
        visual_dim=None,
        inner_dim=None,
        dropout=0.1,
        candidates=None,
        original=False,
        use_adapters=False,
    ):
        super().__init__()
        self._check_language_model(language_model)
        self.language_model = language_model
        self.vision_model = vision_model
        self.options = {
            "num_labels": self._checked_labels(num_labels),
            "num_heads": self.default_sizes["num_heads"] if num_heads is None else num_heads,
            "visual_dim": self._checked_visual_dim(visual_dim),
            "inner_dim": self.default_sizes["inner_dim"] if inner_dim is None else inner_dim,
            "dropout": dropout,
            "candidates": candidates,
            "original": original,
            "use_adapters": use_adapters,
        }
        self._check_switches()
        self.insert_layer = insert_layer
        self._add_layers()
        if use_adapters:
            places = adapter_places(self._base, self.adapters)
            add_adapters(places.values(), partial(self.adapters.new_layer, **self._place()))
        self._freeze()
        self.train(language_model.training)
        self.register_state_dict_post_hook(_leave_out_twins)
        self.register_load_state_dict_pre_hook(_fill_in_twins)

    @property
    def insert_layer(self):
        return self._insert_layer

    @insert_layer.setter
    def insert_layer(self, layer):
        if type(layer) is not int or not 0 <= layer < self.num_layers:
            raise self._wrong(f"insert_layer must be an integer in [0, {self.num_layers - 1}], got {layer!r}")
        self._insert_layer = layer

    @property
    def num_layers(self):
        return len(self._layers)

    def train(self, mode=True):
        super().train(mode)
        if self.vision_model is not None:
            self.vision_model.eval()
        return self

    def activation_checkpointing_enable(self, **options):
        """Of the language model; transformers' Trainer asks for it here."""
        self.language_model.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options):
        """The same under the name that transformers gave it before 5.23."""
        self.language_model.gradient_checkpointing_enable(**options)

    def save(self, folder):
        """Writes what trains, parameters that require gradients, and how the model was made.

        The folder is complete or, after an error, as it was. With several processes, call it in one.
        """
        options = {**self.options, "insert_layer": self.insert_layer}
        write_files(folder, {"model": type(self).__name__, "options": options}, self._trained())

    @classmethod
    def from_folder(cls, folder, language_model, vision_model=None):
        """A model as it was saved: made from the same language model and vision encoder, and filled.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is broken or does not fit the class or the language model, which has not changed then.
        """
        options, tensors = read_files(folder, cls._parse)
        required_grad = [(parameter, parameter.requires_grad) for parameter in language_model.parameters()]
        model = cls(language_model, vision_model, **options)
        try:
            fill(model._trained(), tensors, folder)
        except BaseException:
            remove_adapters(language_model)
            for parameter, required in required_grad:
                parameter.requires_grad_(required)
            raise
        return model

    @property
    def _base(self):
        """The language model without its head."""
        return self.language_model.base_model

    @classmethod
    def _parse(cls, description):
        check_keys(description, ["model", "options"])
        if description["model"] != cls.__name__:
            raise ValueError(f"saved from a {description['model']}, not a {cls.__name__}")
        check_keys(description["options"], cls.__init__.__kwdefaults__)
        return description["options"]

    def _trained(self):
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _place(self):
        weight = self.language_model.get_input_embeddings().weight
        return {"dim": weight.size(1), "device": weight.device, "dtype": weight.dtype}

    def _add_layers(self):
        place, options = self._place(), self.options
        count = self.num_layers if options["candidates"] else 1
        sizes = {name: options[name] for name in ("num_heads", "visual_dim", "inner_dim", "dropout")}
        self.visual_prompts = nn.ModuleList(VisualPromptLayer(**sizes, **place) for _ in range(count))
        dim = place.pop("dim")
        # Normal(0, 1), as the authors start it, far beyond the states to which it is added.
        self.type_embeddings = nn.ModuleList(
            nn.Embedding(self.num_token_types, dim, **place) for _ in range(count if self.num_token_types else 0)
        )
        self.classifier = None
        if options["num_labels"] is not None:
            self.classifier = mlp_head(dim, self._head_width(dim), options["num_labels"], **place)
            for layer in (self.classifier[0], self.classifier[-1]):
                nn.init.normal_(layer.weight, std=HEAD_STD)
                nn.init.zeros_(layer.bias)

    def _freeze(self):
        """Lets train: new layers and, of the language model, adapters and norms or all that runs."""
        self.language_model.requires_grad_(False)
        if self.vision_model is not None:
            self.vision_model.requires_grad_(False)
        for part in self.parts:
            for name, parameter in getattr(self._base, part).named_parameters(prefix=part):
                parameter.requires_grad_(not self.options["use_adapters"] or self._trains_beside_adapters(name))

    def _trains_beside_adapters(self, name):
        return ".adapter." in name or any(name.startswith(part) and rest in name for part, rest in self.norms)

    def _visual(self, input_ids, pixel_values, visual_features, visual_mask):
        """The `Visual` of `forward`'s arguments."""
        if (pixel_values is None) == (visual_features is None):
            raise self._wrong("give either pixel_values or visual_features")
        if pixel_values is not None:
            visual_features = self._see(pixel_values)
        width = self.options["visual_dim"]
        if visual_features.dim() != 3 or visual_features.size(2) != width:
            raise self._wrong(f"visual_features must be [B, N, {width}], got {list(visual_features.shape)}")
        if len(visual_features) != len(input_ids):
            raise self._wrong(
                f"images and texts must be as many, got {len(visual_features)} and input_ids {list(input_ids.shape)}"
            )
        return Visual(visual_features, None if visual_mask is None else visual_mask != 0)

    def _see(self, pixel_values):
        if self.vision_model is None:
            raise self._wrong("pixel_values need a vision_model; without one, give visual_features")
        with torch.no_grad():
            return self.vision_model(pixel_values=pixel_values).last_hidden_state

    def _insert(self, states, query, visual):
        """states [B, T, D] and the query [B, D] to [B, 1 + T, D]."""
        index = self.insert_layer if self.options["candidates"] else 0
        layer = self.visual_prompts[index]
        dtype = layer.query.weight.dtype
        prompt = layer(visual.features.to(dtype), query.to(dtype), visual.mask).to(states.dtype)
        if self.type_embeddings:
            of_text, of_prompt = self.type_embeddings[index].weight.to(states.dtype)
            states, prompt = states + of_text, prompt + of_prompt
        return torch.cat([prompt[:, None], states], dim=1)

    def _classified(self, features, labels):
        """The output of the head, with the loss that fits the kind of labels."""
        logits = self.classifier(features.to(self.classifier[0].weight.dtype))
        soft = labels is not None and labels.is_floating_point()
        return SequenceClassifierOutput(
            loss=(soft_target_loss if soft else class_loss)(self, logits, labels), logits=logits
        )

    def _check_text(self, input_ids, attention_mask):
        if input_ids.dim() != 2 or input_ids.size(1) == 0:
            raise self._wrong(f"input_ids must be [B, T] with T above zero, got {list(input_ids.shape)}")
        if attention_mask is None:
            return
        if attention_mask.shape != input_ids.shape:
            raise self._wrong(
                f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}"
            )
        self._check_rows(attention_mask != 0)

    def _check_rows(self, takes_part):
        self._refuse_samples(~takes_part.any(1), "attention_mask hides all tokens")

    def _refuse_samples(self, wrong, message):
        if not wrong.is_meta and wrong.any():
            raise self._wrong(f"{message} of sample {wrong.nonzero()[0].item()}")

    def _check_language_model(self, model):
        found = getattr(getattr(model, "config", None), "model_type", None)
        if found != self.family:
            raise self._wrong(
                f"language_model must be a Hugging Face model of the type {self.family!r}, got {type(model).__name__}"
            )
        missing = [part for part in self.parts if not hasattr(model.base_model, part)]
        if missing:
            raise self._wrong(f"language_model must have {missing[0]!r}, which {type(model).__name__} lacks")

    def _checked_labels(self, num_labels):
        if type(num_labels) is not int or num_labels < 1:
            raise self._wrong(f"num_labels must be a positive integer, got {num_labels!r}")
        return num_labels

    def _checked_visual_dim(self, visual_dim):
        width = getattr(getattr(self.vision_model, "config", None), "hidden_size", None)
        if width is None and visual_dim is None:
            raise self._wrong("visual_dim is needed where no vision_model has a config.hidden_size")
        if width is not None and visual_dim not in (None, width):
            raise self._wrong(f"visual_dim must be the vision_model's hidden_size, {width}, got {visual_dim!r}")
        return width if visual_dim is None else visual_dim

    def _check_switches(self):
        if self.options["candidates"] not in (None, "all"):
            raise self._wrong(f'candidates must be None or "all", got {self.options["candidates"]!r}')
        for name in ("original", "use_adapters"):
            if type(self.options[name]) is not bool:
                raise self._wrong(f"{name} must be True or False, got {self.options[name]!r}")

    def _wrong(self, message):
        return ValueError(f"{type(self).__name__}: {message}")

    @staticmethod
    def _head_width(dim):
        return 2 * dim


class DVPBert(DVPModel):
    """DVP on BERT: the query is the state of [CLS], whose last state the head reads. All rows see each other.

    Text and prompt get a row of a type table of their own where they meet; the prompt gets no position. At K = 0 the
    prompt does not depend on the text. `original=True` changes nothing here.

    With use_adapters: behind the dropout of every attention and MLP, before the residual and the LayerNorm, whereas
    `AdapterConfig` puts them before the dropout. The LayerNorms of the encoder train, not that of the embeddings.
    """

    family = "bert"
    parts = ("embeddings", "encoder")
    norms = (("encoder.", "LayerNorm"),)
    adapters = AdapterPlan(
        places=r"encoder\.layer\.\d+\.(attention\.)?output\.dropout",
        reduction=8,
        activation="relu",
        initialise=partial(nn.init.normal_, std=0.01),
    )

    @property
    def _layers(self):
        return self._base.encoder.layer

    def _check_language_model(self, model):
        super()._check_language_model(model)
        if model.config.is_decoder:
            raise self._wrong("language_model must be an encoder, but its config.is_decoder is True")

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        visual_features=None,
        visual_mask=None,
        labels=None,
    ):
        """
        Args:
            input_ids: [B, T], [CLS] first.
            attention_mask: [B, T], 1 for a token and 0 for padding; None is all 1.
            token_type_ids: [B, T], BERT's; None is all 0.
            pixel_values: what the vision model takes.
            visual_features: in their place, what it would return, [B, N, Dv].
            visual_mask: [B, N], 0 for visual tokens that are hidden; None hides none.
            labels: scores of the answers [B, L] for binary cross-entropy, or class indices [B] for cross-entropy.

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: a shape does not fit, or a sample has no token.
        """
        self._check_text(input_ids, attention_mask)
        visual = self._visual(input_ids, pixel_values, visual_features, visual_mask)
        states = self._base.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        states = self._run(self._layers[: self.insert_layer], states, attention_mask)
        states = self._insert(states, states[:, 0], visual)
        states = self._run(self._layers[self.insert_layer :], states, _with_prompt(attention_mask))
        return self._classified(states[:, 1], labels)

    def _run(self, layers, states, attention_mask):
        mask = create_bidirectional_mask(self._base.config, states, attention_mask)
        for layer in layers:
            states = layer(states, mask)
        return states

    def _check_rows(self, takes_part):
        super()._check_rows(takes_part)
        self._refuse_samples(~takes_part[:, 0], "attention_mask hides the first token, [CLS],")


class DVPT5(DVPModel):
    """DVP on T5: the encoder reads the text alone; the prompt enters the decoder, in front of its one start token,
    whose last state the head reads. The query is the mean of the encoder's output.

    `original=True` computes what the authors' code does, where standard T5 is the default:
    - relative position biases act in the first block of the encoder and of the decoder only, not in all;
    - the decoder is not causal: the prompt sees the start token too;
    - the mean counts padding.

    With use_adapters: on the outputs of all attentions and MLPs, before dropout and residual. All norms train.
    """

    family = "t5"
    parts = ("shared", "encoder", "decoder")
    norms = (("encoder.", "layer_norm"), ("decoder.", "layer_norm"))
    adapters = AdapterPlan(
        places=r"(en|de)coder\.block\.\d+\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)",
        reduction=8,
        activation="relu",
        initialise=partial(nn.init.normal_, std=0.01),
    )

    @property
    def _layers(self):
        return self._base.decoder.block

    def _check_language_model(self, model):
        super()._check_language_model(model)
        if model.config.decoder_start_token_id is None:
            raise self._wrong("language_model must have a config.decoder_start_token_id")

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        visual_features=None,
        visual_mask=None,
        labels=None,
    ):
        """
        Args:
            input_ids: [B, T], the encoder's.
            attention_mask, pixel_values, visual_features, visual_mask, labels: as in `DVPBert.forward`.

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: a shape does not fit, or a sample has no token.
        """
        self._check_text(input_ids, attention_mask)
        visual = self._visual(input_ids, pixel_values, visual_features, visual_mask)
        decoder = self._base.decoder
        text = self._encode(input_ids, attention_mask)
        states = decoder.dropout(decoder.embed_tokens(self._start_tokens(input_ids)))
        states = self._run(self._layers[: self.insert_layer], states, text, attention_mask)
        states = self._insert(states, self._mean(text, attention_mask), visual)
        states = self._run(self._layers[self.insert_layer :], states, text, attention_mask)
        return self._classified(decoder.dropout(decoder.final_layer_norm(states))[:, -1], labels)

    def _encode(self, input_ids, attention_mask):
        encoder = self._base.encoder
        if not self.options["original"]:
            return encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        states = encoder.dropout(encoder.embed_tokens(input_ids))
        mask = create_bidirectional_mask(encoder.config, states, attention_mask)
        for block in encoder.block:  # without biases from the first, the others take zeros
            states = block(states, mask)[0]
        return encoder.dropout(encoder.final_layer_norm(states))

    def _mean(self, text, attention_mask):
        if attention_mask is None or self.options["original"]:
            return text.mean(1)
        takes_part = (attention_mask != 0)[..., None]
        return text.masked_fill(~takes_part, 0).sum(1) / takes_part.sum(1)

    def _start_tokens(self, input_ids):
        return input_ids.new_full((len(input_ids), 1), self.language_model.config.decoder_start_token_id)

    def _run(self, blocks, states, text, attention_mask):
        if len(blocks) == 0:
            return states
        config = self._base.decoder.config
        mask, bias = self._self_attention(states)
        text_mask = create_bidirectional_mask(config, states, attention_mask, encoder_hidden_states=text)
        for block in blocks:
            states = block(states, mask, bias, text, text_mask)[0]
        return states

    def _self_attention(self, states):
        """(mask, biases) of the decoder's rows; the first block has the table of the biases."""
        length = states.size(1)
        if self.options["original"]:
            return states.new_zeros(len(states), 1, length, length), None
        first = self._layers[0].layer[0].SelfAttention
        mask = create_causal_mask(self._base.decoder.config, states, None, None)
        return mask, first.compute_bias(length, length, device=states.device)


class DVPLlama(DVPModel):
    """DVP on LLaMA: the query is the state of the question's end, whose last state the head reads. The prompt stands
    before the first token, which all text sees; from layer K on, the text's positions are greater by 1.

    The question's end is its first end-of-sequence token or, without one, its last token. Positions count what the
    mask does not hide, so that texts can be padded on either side.

    Without num_labels and from a model with a language modelling head, it continues texts (`generate`).

    `original=True` takes the first token, as the authors' code does, for the end of a question without an
    end-of-sequence token. Their heads for GQA and SNLI-VE start as torch's layers do; here all start as that for VQA.

    With use_adapters, as in all the authors' configurations: on the outputs of all attentions and MLPs, before the
    residual. All norms train.
    """

    family = "llama"
    parts = ("embed_tokens", "layers", "norm")
    norms = (("layers.", "layernorm"), ("norm.", ""))
    adapters = AdapterPlan(
        places=r"layers\.\d+\.(self_attn|mlp)",
        reduction=64,
        activation="silu",
        initialise=nn.init.xavier_uniform_,
    )
    num_token_types = 0
    default_sizes: ClassVar[dict] = {"num_heads": 16, "inner_dim": 512}

    @property
    def _layers(self):
        return self._base.layers

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        visual_features=None,
        visual_mask=None,
        labels=None,
        question_end=None,
        past_key_values=None,
    ):
        """
        Args:
            input_ids: [B, T]; with a filled past_key_values only the new tokens.
            attention_mask: [B, T], with a filled past_key_values those before included; None is all 1.
            pixel_values, visual_features, visual_mask: as in `DVPBert.forward`; none with a filled past_key_values,
                which holds the prompt.
            labels: as in `DVPBert.forward`; without a classifier the tokens [B, T] as in LlamaForCausalLM, -100 where
                none is asked for. The question then ends before the first that is.
            question_end: [B], the index in input_ids of the token whose state is the query. Given an answer without
                labels, it keeps the query from reading it.
            past_key_values: a transformers Cache, empty or as an earlier call with the same insert_layer left it.

        Returns:
            SequenceClassifierOutput with logits [B, L]; without a classifier CausalLMOutputWithPast with logits
            [B, T, vocabulary]. Given labels, with the loss.

        Raises:
            ValueError: a shape does not fit, a sample has no token, or the cache is another insert_layer's.
        """
        cache, visual = past_key_values, None
        if cache is not None and self.classifier is not None:
            raise self._wrong("past_key_values are for language modelling, but num_labels made a classifier")
        if labels is not None and self.classifier is None and labels.shape != input_ids.shape:
            raise self._wrong(f"labels must be tokens {list(input_ids.shape)}, got {list(labels.shape)}")
        if self._seen(cache):
            self._check_continued(input_ids, attention_mask, cache, (pixel_values, visual_features, visual_mask))
        else:
            self._check_text(input_ids, attention_mask)
            visual = self._visual(input_ids, pixel_values, visual_features, visual_mask)
        if question_end is None and visual is not None:
            question_end = self._question_end(input_ids, attention_mask, labels)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        states = self._run(0, self.insert_layer, self._base.embed_tokens(input_ids), attention_mask, cache)
        if visual is not None:
            states = self._insert(states, states[rows, question_end], visual)
        states = self._run(self.insert_layer, None, states, _with_prompt(attention_mask), cache)
        states = self._base.norm(states)
        if self.classifier is not None:
            return self._classified(states[rows, question_end + 1], labels)
        return self._worded(states if visual is None else states[:, 1:], labels, cache)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=64, **inputs):
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
        logits = self(input_ids, mask, past_key_values=cache, **inputs).logits
        last, rows = _last_token(mask), torch.arange(len(input_ids), device=input_ids.device)
        tokens = [logits[rows, last].argmax(-1)]
        while len(tokens) < max_new_tokens and not torch.isin(tokens[-1], ends).all():
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            following = self(tokens[-1][:, None], mask, past_key_values=cache).logits[:, -1].argmax(-1)
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
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=cosines_and_sines,
            )
        return states

    def _worded(self, states, labels, cache):
        """The output of the language modelling head."""
        logits, loss = self.language_model.lm_head(states), None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device), ignore_index=IGNORED
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

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

    def _seen(self, cache):
        """How many rows layer K has seen."""
        return 0 if cache is None else cache.get_seq_length(self.insert_layer)

    def _check_continued(self, input_ids, attention_mask, cache, images):
        if any(given is not None for given in images):
            raise self._wrong("past_key_values hold the prompt already, but an image is given again")
        layer = self.insert_layer
        lengths = [cache.get_seq_length(i) for i in range(self.num_layers)]
        text = lengths[layer] - 1
        if lengths != [text] * layer + [text + 1] * (self.num_layers - layer):
            raise self._wrong(
                f"past_key_values must be those of insert_layer {layer}, one row more from it on, got {lengths} rows"
            )
        shape = (len(input_ids), text + input_ids.size(1))
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


def _twins(model):
    """{name: the first name of the same tied parameter}."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {twin: first for first, *twins in names.values() for twin in twins}


def _leave_out_twins(model, state, prefix, _):
    """Tied weights stand once in a state dict: safetensors, which transformers' Trainer writes, refuses them twice."""
    for twin in _twins(model):
        state.pop(prefix + twin, None)


def _fill_in_twins(model, state, prefix, *_):
    for twin, first in _twins(model).items():
        if prefix + first in state:
            state.setdefault(prefix + twin, state[prefix + first])


def _with_prompt(attention_mask):
    """[B, T] to [B, 1 + T], the prompt visible."""
    if attention_mask is None:
        return None
    return torch.cat([attention_mask.new_ones(len(attention_mask), 1), attention_mask], dim=1)


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
