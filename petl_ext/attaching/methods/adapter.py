"""Bottleneck adapters behind and beside attentions and MLPs.

An output module, `dense -> dropout -> (LayerNorm)`, takes (hidden_states, input_tensor). In post-norm blocks (BERT,
METER) input_tensor is the residual, and the module adds it and ends in a LayerNorm. In pre-norm blocks (ViLT) there is
no LayerNorm: an attention's module takes the normalised stream and leaves the residual to the block, an MLP's takes the
stream and adds it. Where there are no output modules (CLIP, T5, LLaMA, diffusers), whole attentions and MLPs take the
normalised stream and leave the residual to the block.
"""

from petl_ext.attaching.sites.output_modules import AttentionOutputSite, MLPOutputSite, attention_outputs
from petl_ext.attaching.sites.projections import ATTENTIONS, MLPS, ProjectionSite
from petl_ext.attaching.sites.site import Site, fused_kernel
from petl_ext.counting import adapter_macs


class AdapterSite(Site):
    """A module with a child `adapter`, an `AdapterLayer`."""

    child = "adapter"

    @staticmethod
    def macs(layer, tokens):
        bottleneck, dim = layer.down.shape
        return adapter_macs(tokens, dim, bottleneck)

    @staticmethod
    def kernel(layer):
        return fused_kernel("adapter", layer)


class SequentialAdapterSelfOutput(AttentionOutputSite, AdapterSite):
    """The adapter behind an attention's projection (arXiv 1902.00751): before the dropout in post-norm blocks, after it
    in pre-norm ones, as in the baselines of the APT paper (arXiv 2306.15706)."""

    looked_for = "output modules (dense, dropout, perhaps LayerNorm) of attentions"

    def forward(self, hidden_states, input_tensor):
        if hasattr(self, "LayerNorm"):
            return self.LayerNorm(self.dropout(self.adapter(self.dense(hidden_states))) + input_tensor)
        return self.adapter(self.dropout(self.dense(hidden_states)))


class SequentialAdapterOutput(MLPOutputSite, SequentialAdapterSelfOutput):
    """The same behind an MLP's second projection."""

    looked_for = "output modules (dense, dropout, perhaps LayerNorm) of MLPs"

    def forward(self, hidden_states, input_tensor):
        hidden_states = super().forward(hidden_states, input_tensor)
        return hidden_states if hasattr(self, "LayerNorm") else hidden_states + input_tensor


class ParallelAdapterSelfOutput(AttentionOutputSite, AdapterSite):
    """The adapter beside an attention (arXiv 2110.04366): it reads what the attention was given, and is added to the
    module's output, behind a LayerNorm, as in the baselines of the APT paper (arXiv 2306.15706)."""

    looked_for = SequentialAdapterSelfOutput.looked_for

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dropout(self.dense(hidden_states))
        if hasattr(self, "LayerNorm"):
            hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return self.adapter(input_tensor, residual=hidden_states)


class ParallelAdapterOutput(MLPOutputSite, AdapterSite):
    """The adapter beside an MLP, which reads the residual and is added behind a LayerNorm: also DAS's
    (arXiv 2309.01479)."""

    looked_for = SequentialAdapterOutput.looked_for

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dropout(self.dense(hidden_states)) + input_tensor
        if hasattr(self, "LayerNorm"):
            hidden_states = self.LayerNorm(hidden_states)
        return self.adapter(input_tensor, residual=hidden_states)


class SequentialAdapterProjection(ProjectionSite, AdapterSite):
    """The adapter behind the projection in which an attention or MLP ends (arXiv 1902.00751), before the residual."""

    looked_for = "attentions and MLPs that end in a projection"
    kinds = ATTENTIONS + MLPS

    def changed(self, x, y):
        return self.adapter(y)


class ParallelAdapterProjection(SequentialAdapterProjection):
    """The adapter beside such an attention or MLP (arXiv 2110.04366): it reads the same input."""

    def changed(self, x, y):
        return self.adapter(x, residual=y)


class StreamAdapterSelfOutput(AttentionOutputSite, AdapterSite):
    """DAS beside a post-norm attention: its adapter reads the residual and is added before the LayerNorm."""

    looked_for = "output modules of attentions that end in a LayerNorm"

    @staticmethod
    def candidates(model):
        return {name: module for name, module in attention_outputs(model).items() if hasattr(module, "LayerNorm")}

    def forward(self, hidden_states, input_tensor):
        attended = self.dropout(self.dense(hidden_states)) + input_tensor
        return self.LayerNorm(self.adapter(input_tensor, residual=attended))


class StreamAdapterBlock(AdapterSite):
    """DAS beside a pre-norm attention: its adapter reads the stream before the block's first LayerNorm, which only the
    block itself sees. So `forward` is the whole of ViLT's block."""

    looked_for = "pre-norm blocks (layernorm_before, attention, layernorm_after, intermediate, output)"

    @staticmethod
    def candidates(model):
        parts = {"layernorm_before", "attention", "layernorm_after", "intermediate", "output"}
        return {name: module for name, module in model.named_modules() if parts <= module._modules.keys()}

    @staticmethod
    def neighbour(module):
        return module.layernorm_before

    def forward(self, hidden_states, *arguments, **named):
        attended, *attentions = self.attention(self.layernorm_before(hidden_states), *arguments, **named)
        hidden_states = self.adapter(hidden_states, residual=attended + hidden_states)
        output = self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)
        return output, *attentions
