"""What the layers of families become that can be skipped, where they return or need more than a tensor."""

from torch import nn

from petl_ext.attaching.methods.das import SkippableLayer, arguments_of


class SkippableTupleLayer(SkippableLayer):
    """A layer that returns its hidden states in a tuple, attentions behind them, of which a skipped one has none."""

    def returned(self, hidden_states, *arguments, **named):
        return hidden_states, None


class SkippableViltLayer(SkippableLayer):
    """ViLT's layer returns a tuple; a skipped one has no attentions."""

    def returned(self, hidden_states, attention_mask=None, output_attentions=False):
        return (hidden_states, None) if output_attentions else (hidden_states,)


class SkippableLlamaLayer(SkippableLayer):
    """A pre-norm layer, whose bypass keeps the layer's first norm, as the authors' code for LLaMA does."""

    own_norm = "input_layernorm"
    survivors = ("input_layernorm",)

    @staticmethod
    def fits(layer):
        return SkippableLayer.fits(layer) and isinstance(getattr(layer, "input_layernorm", None), nn.Module)


class SkippableGemma4Layer(SkippableLlamaLayer):
    """Gemma 4's layer. Some models' last layers have no keys and values but take those of an earlier one."""

    @classmethod
    def check(cls, layer):
        if getattr(layer.config, "num_kv_shared_layers", 0) and layer.self_attn.store_full_length_kv:
            raise ValueError("it must run, as later layers take its keys and values; name the others in sites")


class SkippableMllamaLayer(SkippableLlamaLayer):
    """Mllama's layers that ask the image keep their own slots in the cache, in which the model looks for the image."""

    def forward(self, hidden_states=None, *arguments, hidden_state=None, **named):
        # The vision tower of transformers 5.17 calls its layers with the second name.
        return super().forward(hidden_states if hidden_state is None else hidden_state, *arguments, **named)

    @staticmethod
    def rewire(stack, numbered, slot_types):
        types = [index if hasattr(layer, "cross_attn") else None for index, layer in enumerate(stack)]
        SkippableLlamaLayer.rewire(stack, numbered, types)


class SkippableLlama4VisionLayer(SkippableTupleLayer):
    """The layer of Llama 4's vision tower, which is called by the name of its own first argument."""

    looked_for = "layers (modules of a ModuleList whose forward takes hidden_state first)"

    @staticmethod
    def fits(layer):
        return arguments_of(layer)[:1] == ["hidden_state"]

    def forward(self, hidden_state, *arguments, **named):
        return super().forward(hidden_state, *arguments, **named)


class SkippableTimmBlock(SkippableLayer):
    """timm's block, which takes x first; those of its ViT stand in a Sequential."""

    @classmethod
    def candidates(cls, model):
        return {
            f"{name}.{index}".lstrip("."): block
            for name, blocks in model.named_modules()
            if isinstance(blocks, nn.ModuleList | nn.Sequential)
            for index, block in blocks.named_children()
            if cls.fits(block)
        }

    @staticmethod
    def fits(block):
        return {"norm1", "attn", "norm2", "mlp"} <= block._modules.keys()


class SkippableFusionLayer(SkippableTupleLayer):
    """BridgeTower's layer in which one stream asks the other."""

    @staticmethod
    def fits(layer):
        return SkippableLayer.fits(layer) and hasattr(layer, "crossattention")


class SkippableT5Block(SkippableLayer):
    """T5's block returns its position biases too, which block 0 computes for all.

    Where block 0 is skipped, the first block that runs is lent the table of block 0: without one it would make the
    biases zero. The table stays block 0's in the state dict.
    """

    own_norm = "layer.0.layer_norm"
    survivors = ("layer.0.layer_norm", "layer.0.SelfAttention.relative_attention_bias")

    @staticmethod
    def fits(layer):
        return isinstance(getattr(layer, "layer", None), nn.ModuleList) and hasattr(layer.layer[0], "SelfAttention")

    def returned(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        **named,
    ):
        return hidden_states, position_bias, encoder_decoder_position_bias

    @staticmethod
    def rewire(stack, numbered, slot_types):
        SkippableLayer.rewire(stack, numbered, slot_types)
        owner, *others = (block.layer[0].SelfAttention for block in stack)
        for attention in others:
            attention.has_relative_attention_bias = False
            vars(attention).pop("relative_attention_bias", None)
        running = (block for block in stack if not getattr(block, "skipped", False))
        first = next(running, stack[0]).layer[0].SelfAttention
        if first is not owner:
            first.has_relative_attention_bias = True
            vars(first)["relative_attention_bias"] = owner.relative_attention_bias


class SkippableUMT5Block(SkippableLayer):
    """UMT5's block returns a tensor: every block has position biases of its own."""

    own_norm = "layer.0.layer_norm"
    survivors = ("layer.0.layer_norm",)
    fits = staticmethod(SkippableT5Block.fits)
