"""Adapters of public code bases, written from what they compute and from what their parts are called there.

Where several code bases have the same one, it stands once. `original_modules.py` has those of APT, DAS, DVP and of the
library adapters; unify-PET's and AdaptFormer's is its ParallelAdapter.
"""

import torch
import torch.nn.functional as F
from torch import nn

DIM, INNER = 32, 8


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


class Activations(nn.Module):
    """Of VL-adapter, compacter and others: named by a string."""

    def __init__(self, function):
        super().__init__()
        self.f = function

    def forward(self, x):
        return self.f(x)


class TransformersAdapter(nn.Module):
    """Of adapter-transformers 2 and 3, which has no dropout; residual and gate as later."""

    def __init__(self, activation, norm_first=False, parallel=False):
        super().__init__()
        self.add_layer_norm_before, self.parallel = norm_first, parallel
        layers = []
        if norm_first:
            self.adapter_norm_before = nn.LayerNorm(DIM)
            layers.append(self.adapter_norm_before)
        self.non_linearity = Activations(activation)
        self.adapter_down = nn.Sequential(*layers, nn.Linear(DIM, INNER), self.non_linearity)
        self.adapter_up = nn.Linear(INNER, DIM)
        self.scaling = 1.0

    def forward(self, x, residual_input):
        down = self.adapter_down(x)
        up = self.adapter_up(down) * self.scaling
        return up if self.parallel else up + residual_input, down, up


class GatingTransformersAdapter(TransformersAdapter):
    """Of its third version."""

    def forward(self, x, residual_input, output_gating=False):
        return super().forward(x, residual_input)


class VLAdapter(nn.Module):
    """Of VL-adapter, Ladder-Side-Tuning and compacter: no residual."""

    def __init__(self, activation):
        super().__init__()
        self.activation = Activations(activation)
        self.down_sampler = nn.Linear(DIM, INNER)
        self.up_sampler = nn.Linear(INNER, DIM)
        self.track_z = False

    def forward(self, x):
        return self.up_sampler(self.activation(self.down_sampler(x)))


class VLAdapterLayer(nn.Module):
    """Around it: norms and the residual."""

    def __init__(self, before=False, after=False, track_z=False):
        super().__init__()
        self.adapter = VLAdapter(F.relu)
        self.track_z = track_z
        self.pre_layer_norm = nn.LayerNorm(DIM) if before else None
        self.post_layer_norm = nn.LayerNorm(DIM) if after else None

    def forward(self, inputs):
        z = inputs if self.pre_layer_norm is None else self.pre_layer_norm(inputs)
        z = self.adapter(z)
        if self.track_z:
            self.z = z
        return (z if self.post_layer_norm is None else self.post_layer_norm(z)) + inputs


class VisualAdapter(nn.Module):
    """VL-adapter's of images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(DIM, INNER, 1, bias=False), nn.BatchNorm2d(INNER)
        self.conv2, self.bn2 = nn.Conv2d(INNER, DIM, 1, bias=False), nn.BatchNorm2d(DIM)

    def forward(self, x):
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class AimAdapter(nn.Module):
    """AIM's, copied in many code bases of videos."""

    def __init__(self, skip_connect=True):
        super().__init__()
        self.skip_connect = skip_connect
        self.act = nn.GELU()
        self.D_fc1, self.D_fc2 = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)

    def forward(self, x):
        out = self.D_fc2(self.act(self.D_fc1(x)))
        return x + out if self.skip_connect else out


class AimSpatialAdapter(nn.Module):
    """SAdapter2: the residual is added where it is made."""

    def __init__(self):
        super().__init__()
        self.D_fc1, self.D_fc2, self.act = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM), nn.GELU()

    def forward(self, x):
        hidden = self.D_fc1(x)
        hidden = self.act(hidden)
        return self.D_fc2(hidden) + x


class BiAdapter(nn.Module):
    """PETL-ViT's Bi-AdaptFormer, of 32 bits if `linear` is nn.Linear."""

    def __init__(self, linear=nn.Linear, activation=F.relu):
        super().__init__()
        self.adapter_down, self.adapter_up = linear(DIM, INNER, bias=False), linear(INNER, DIM, bias=False)
        self.dropout, self.scale, self.activation = nn.Dropout(0.1), 0.5, activation

    def forward(self, x):
        return self.adapter_up(self.dropout(self.activation(self.adapter_down(x)))) * self.scale


class OneBitLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


def identity(x):
    return x


class Convpass(nn.Module):
    """PETL-ViT's, on square grids of tokens."""

    def __init__(self):
        super().__init__()
        self.adapter_conv = nn.Conv2d(INNER, INNER, 3, 1, 1)
        self.adapter_down, self.adapter_up = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)

    def forward(self, x):
        side = int(x.size(1) ** 0.5)
        grid = F.silu(self.adapter_down(x)).transpose(1, 2).unflatten(2, (side, side))
        return self.adapter_up(F.silu(self.adapter_conv(grid)).flatten(2).transpose(1, 2))


class Factors(nn.Module):
    """PETL-ViT's FacT: what is added to a projection's weight, in factors."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Linear(DIM, INNER, bias=False), nn.Linear(INNER, DIM, bias=False)
        self.c = nn.Linear(INNER, INNER, bias=False)

    def forward(self, x):
        return self.v(self.c(self.u(x)))


class SuperAdapter(nn.Module):
    """NOAH's: of its weights a call uses as much as its configuration says."""

    def __init__(self):
        super().__init__()
        self.ad_down, self.ad_up = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)
        self.sampled = INNER // 2

    def forward(self, x):
        hidden = F.linear(x, self.ad_down.weight[: self.sampled], self.ad_down.bias[: self.sampled])
        return x + F.linear(hidden * torch.sigmoid(1.702 * hidden), self.ad_up.weight[:, : self.sampled])


class ClipAdapter(nn.Module):
    """CLIP-Adapter: a second ReLU behind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(DIM, INNER, bias=False), nn.ReLU(), nn.Linear(INNER, DIM, bias=False), nn.ReLU()
        )

    def forward(self, x):
        return self.fc(x)


class LavinMlp(nn.Module):
    """AdapterMLP of LaVIN and of DVP for ScienceQA, from CLIP's width to LLaMA's."""

    def __init__(self, wide):
        super().__init__()
        self.conv_A, self.conv_B = nn.Linear(DIM, INNER), nn.Linear(INNER, wide)

    def forward(self, x):
        with torch.autocast("cuda"):
            return self.conv_B(F.silu(self.conv_A(x)))


class RepAdapter(nn.Module):
    """Of LaVIN, and of DAS for it: no activation, and grouped convolutions over channels."""

    def __init__(self, groups=2):
        super().__init__()
        self.conv_A, self.conv_B = nn.Conv1d(DIM, INNER, 1), nn.Conv1d(INNER, DIM, 1, groups=groups)
        self.dropout, self.scale = nn.Dropout(0.1), 2.0

    def forward(self, x):
        x = x.transpose(1, 2)
        return (self.conv_B(self.dropout(self.conv_A(x))) * self.scale + x).transpose(1, 2)


class RoutedAdapter(nn.Module):
    """LaVIN's Router: two of them, mixed as the first token says."""

    def __init__(self):
        super().__init__()
        self.conv_A, self.conv_B = nn.Conv1d(DIM, INNER, 1), nn.Conv1d(INNER, DIM, 1, groups=2)
        self.conv_D, self.expert_weights = nn.Conv1d(INNER, DIM, 1, groups=2), nn.Linear(DIM, 2)

    def forward(self, x):
        weights = torch.softmax(self.expert_weights(x[:, 0]), -1)
        hidden = self.conv_A(x.transpose(1, 2))
        mixed = self.conv_B(hidden) * weights[:, :1, None] + self.conv_D(hidden) * weights[:, 1:, None]
        return mixed.transpose(1, 2) + x


class PoolingAdapter(nn.Module):
    """EAS's PIAdapter_Attn: what it adds depends on all tokens."""

    def __init__(self):
        super().__init__()
        self.conv_A, self.conv_B = nn.Conv1d(DIM, INNER, 1), nn.Conv1d(INNER, DIM, 1)

    def forward(self, x):
        hidden = self.conv_A(x.transpose(1, 2))
        return x + self.conv_B(hidden * hidden.mean(-1, keepdim=True)).transpose(1, 2)


class AutocastAdapter(nn.Module):
    """Of DAS for LLaVA and LaVIN."""

    def __init__(self, device="cuda", dtype=torch.float16, enabled=True):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(DIM, INNER), nn.ReLU(), nn.Linear(INNER, DIM)
        self.autocast = device, dtype, enabled

    def forward(self, x):
        with torch.autocast(*self.autocast):
            return x + self.up(self.act(self.down(x)))


class SpaceTimeAdapter(nn.Module):
    """ST-Adapter: a depthwise convolution over frames between."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)
        self.conv = nn.Conv3d(INNER, INNER, (3, 1, 1), padding=(1, 0, 0), groups=INNER)

    def forward(self, x):
        hidden = self.fc1(x).transpose(1, 2)[..., None, None]
        return x + self.fc2(self.conv(hidden)[..., 0, 0].transpose(1, 2))


class DeltaAdapter(nn.Module):
    """OpenDelta's AdapterLayer and, with `parallel`, ParallelAdapterLayer: called before or after another module."""

    def __init__(self, parallel=False):
        super().__init__()
        self.modulelist = nn.Sequential()
        self.modulelist.add_module("down_proj", nn.Linear(DIM, INNER))
        self.modulelist.add_module("non_linear", Activations(F.relu))
        self.modulelist.add_module("up_proj", nn.Linear(INNER, DIM))
        self.parallel = parallel

    def pre_forward(self, x):
        self.kept = self.modulelist(x)

    def post_forward(self, output):
        return output + self.kept if self.parallel else output + self.modulelist(output)


class LinearWithBottleneck(nn.Linear):
    """LLM-Adapters': a projection that holds a bottleneck."""

    def __init__(self):
        super().__init__(DIM, DIM)
        self.adapter_down, self.adapter_up = nn.Linear(DIM, INNER, bias=False), nn.Linear(INNER, DIM, bias=False)
        self.act_fn, self.adapter_scaling = nn.Tanh(), 1.0

    def forward(self, x):
        added = self.adapter_up(self.act_fn(self.adapter_down(x.to(self.adapter_down.weight.dtype))))
        return F.linear(x, self.weight, self.bias) + added * self.adapter_scaling


class GatedPrompts(nn.Module):
    """LLaMA-Adapter's: prompts that a gate mixes into an attention."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.adapter_wte, self.gate = nn.Embedding(4, DIM), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        prompts = self.adapter_wte.weight
        scores = torch.softmax(self.wq(x) @ self.wk(prompts).t(), -1)
        return x + self.gate.tanh() * (scores @ self.wv(prompts))


class Downsampled(nn.Module):
    """(adapter_downsample, adapter_act_fn, adapter_upsample), with a trained scale of the shape []."""

    def __init__(self):
        super().__init__()
        self.adapter_layer_norm = nn.LayerNorm(DIM)
        self.adapter_downsample, self.adapter_upsample = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)
        self.adapter_act_fn = nn.SiLU()
        self.adapter_scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, hidden_states):
        hidden = self.adapter_act_fn(self.adapter_downsample(self.adapter_layer_norm(hidden_states)))
        return self.adapter_scale * self.adapter_upsample(hidden) + hidden_states


class Projected(nn.Module):
    """(down_proj, act, up_proj), with a switch for the residual."""

    def __init__(self):
        super().__init__()
        self.down_proj, self.act, self.up_proj = nn.Linear(DIM, INNER), nn.ReLU(), nn.Linear(INNER, DIM)

    def forward(self, hidden_states, add_residual=True):
        out = self.up_proj(self.act(self.down_proj(hidden_states)))
        return hidden_states + out if add_residual else out


class Short(nn.Module):
    """(down, up), with a function between."""

    def __init__(self, scale=None):
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM), scale

    def forward(self, x):
        out = self.up(F.gelu(self.down(x)))
        return x + (out if self.scale is None else out * self.scale)
