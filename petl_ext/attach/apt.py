"""APT where an attention ends in a small module `dense -> dropout -> (LayerNorm)`: ViLT, BERT, RoBERTa, METER."""

from petl_ext.attach.output_modules import attention_outputs
from petl_ext.attach.site import Site, fused_kernel
from petl_ext.cost import apt_macs


class APTSelfOutput(Site):
    """What an attention's output module becomes: its projection's result passes the child `apt` before the dropout.

    `forward(hidden_states, input_tensor)`: what the attention's heads say and what the attention was given, both
    [..., D]; returns [..., D]. Where there is a LayerNorm, it takes the sum with the residual, as in BERT.
    """

    child = "apt"
    looked_for = "attention output modules (dense, dropout, perhaps LayerNorm) beside a self-attention"
    candidates = staticmethod(attention_outputs)

    @staticmethod
    def macs(layer, tokens):
        num_prompts, dim = layer.prompts.shape
        return apt_macs(tokens, dim, num_prompts, layer.down.size(0))

    @staticmethod
    def kernel(layer):
        return fused_kernel("apt", layer)

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dropout(self.apt(input_tensor, self.dense(hidden_states)))
        if hasattr(self, "LayerNorm"):
            hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states
