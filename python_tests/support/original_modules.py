"""Stand-ins for modules of other code bases: their attributes, shapes and formulas as published."""

import torch
import torch.nn.functional as F
from torch import nn


class approximate_prompt(nn.Module):
    """APT's, for ViLT and METER."""

    def __init__(self, num_heads, dim_feature, hid_feature, tot_memory, attn_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.mm = nn.Sequential(
            nn.Linear(dim_feature, hid_feature, bias=False), nn.Linear(hid_feature, dim_feature, bias=False)
        )
        self.mm_tokens = nn.Parameter(torch.randn(tot_memory, dim_feature) * 0.02)
        self.activation = nn.ReLU(inplace=True)
        self.attn_drop = nn.Dropout(attn_drop)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x, res):
        scores = self.attn_drop(self.activation(res @ (self.mm_tokens + self.mm(self.mm_tokens)).t()))
        gate = scores.max(dim=-1, keepdim=True)[0].clone().detach()
        return (x + scores @ self.mm_tokens * gate) * self.scale.exp()


class Adapter(nn.Module):
    """The sequential adapter of APT, DAS and DVP."""

    def __init__(self, dim, bottleneck=None):
        super().__init__()
        bottleneck = bottleneck or dim // 8
        self.activation = nn.ReLU(inplace=True)
        self.down_sampler = nn.Linear(dim, bottleneck)
        self.up_sampler = nn.Linear(bottleneck, dim)

    def forward(self, x):
        return x + self.up_sampler(self.activation(self.down_sampler(x)))


class SiluAdapter(nn.Module):
    """DVP's for LLaMA, whose activation is no part."""

    def __init__(self, dim, bottleneck):
        super().__init__()
        self.down_sampler = nn.Linear(dim, bottleneck)
        self.up_sampler = nn.Linear(bottleneck, dim)

    def forward(self, x):
        return x + self.up_sampler(F.silu(self.down_sampler(x)))


class ParallelAdapter(nn.Module):
    """Adapter_Layer of APT and DAS for ViLT, ParallelAdapter for METER."""

    def __init__(self, d_model=768, bottleneck=96, dropout=0.0, adapter_scalar="1.0", adapter_layernorm_option="in"):
        super().__init__()
        self.adapter_layernorm_option = adapter_layernorm_option
        self.adapter_layer_norm_before = None
        if adapter_layernorm_option in ("in", "out"):
            self.adapter_layer_norm_before = nn.LayerNorm(d_model)
        learned = adapter_scalar == "learnable_scalar"
        self.scale = nn.Parameter(torch.ones(1)) if learned else float(adapter_scalar)
        self.down_proj = nn.Linear(d_model, bottleneck)
        self.non_linear_func = nn.ReLU()
        self.up_proj = nn.Linear(bottleneck, d_model)
        self.dropout = dropout

    def forward(self, x, add_residual=True, residual=None):
        residual = x if residual is None else residual
        if self.adapter_layernorm_option == "in":
            x = self.adapter_layer_norm_before(x)
        hidden = self.non_linear_func(self.down_proj(x))
        added = self.up_proj(F.dropout(hidden, p=self.dropout, training=self.training)) * self.scale
        if self.adapter_layernorm_option == "out":
            added = self.adapter_layer_norm_before(added)
        return added + residual if add_residual else added


class Cross_Attention(nn.Module):
    """DVP's; with mid_size and visual_size, that for LLaMA."""

    def __init__(self, hidden_size, drop_rate, num_heads, mid_size=None, visual_size=None):
        super().__init__()
        mid_size, visual_size = mid_size or hidden_size, visual_size or hidden_size
        self.num_heads = num_heads
        self.linear_v = nn.Linear(visual_size, mid_size)
        self.linear_k = nn.Linear(visual_size, mid_size)
        self.linear_q = nn.Linear(hidden_size, mid_size)
        self.linear_merge = nn.Linear(mid_size, hidden_size)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, v, k, q, mask):
        v, k, q = (
            part(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, tokens in ((self.linear_v, v), (self.linear_k, k), (self.linear_q, q))
        )
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask, -1e9)
        pooled = self.dropout(F.softmax(scores, dim=-1)) @ v
        return self.linear_merge(pooled.transpose(1, 2).flatten(2))


class LibraryAdapter(nn.Module):
    """Adapter of the library adapters; with parallel=True its ParallelAdapter, a class of its own there."""

    def __init__(
        self, input_size, down_sample, non_linearity="relu", scaling=1.0, ln_before=False, dropout=0.0, gating=False,
        parallel=False,
    ):  # fmt: skip
        super().__init__()
        self.add_layer_norm_before, self.add_layer_norm_after, self.use_gating = ln_before, False, gating
        layers = []
        if ln_before:
            self.adapter_norm_before = nn.LayerNorm(input_size)
            layers.append(self.adapter_norm_before)
        layers.append(nn.Linear(input_size, down_sample))
        self.non_linearity = Activation_Function_Class(non_linearity)
        self.adapter_down = nn.Sequential(*layers, self.non_linearity)
        self.adapter_up = nn.Linear(down_sample, input_size)
        learned = {"learned": torch.ones(1), "channel": torch.ones(input_size)}
        self.scaling = nn.Parameter(learned[scaling]) if scaling in learned else scaling
        if gating:
            self.gate = nn.Linear(input_size, 1)
        self.dropout = nn.Dropout(dropout)
        self.parallel = parallel

    def forward(self, x, residual_input, output_gating=False):
        down = self.adapter_down(x)
        up = self.adapter_up(down) * self.scaling
        output = self.dropout(up)
        if self.use_gating:
            output = output * torch.sigmoid(self.gate(x)).mean(1).unsqueeze(-1)
        return output if self.parallel else output + residual_input, down, up


class Activation_Function_Class(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.f = {"relu": nn.ReLU(), "gelu": nn.GELU(), "swish": nn.SiLU(), "tanh": nn.Tanh()}[name]

    def forward(self, x):
        return self.f(x)
