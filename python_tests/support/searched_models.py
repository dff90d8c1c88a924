"""Small models that a DepthSearch or a PlacementSearch takes."""

import json

import torch
import torch.nn.functional as F
from torch import nn

import petl_ext

DIM, LAYERS = 8, 8  # of Stack
PROMPTED_LAYERS = 6  # of Placed


class Layer(nn.Module):
    """A residual layer; with noise, one that only disturbs."""

    def __init__(self, dim, hidden, noise=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.noise = noise

    def forward(self, hidden_states) -> torch.Tensor:
        disturbance = self.noise * torch.randn_like(hidden_states)
        return hidden_states + self.down(self.up(self.norm(hidden_states)).tanh()) + disturbance


class Stack(nn.Module):
    def __init__(self, seed=0, hidden=(DIM,) * LAYERS, noisy=(), dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = enumerate(hidden)
        self.layers = nn.ModuleList(Layer(DIM, size, 2.0 if index in noisy else 0.0) for index, size in sizes)
        for layer in self.layers:
            nn.init.normal_(layer.down.weight, std=1.0)
        for index in noisy:
            nn.init.zeros_(self.layers[index].down.weight)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x, target=None):
        for layer in self.layers:
            x = layer(x)
        x = self.head(self.dropout(x))
        return {"output": x} if target is None else {"loss": F.mse_loss(x, target)}


def attached(**arguments):
    model = Stack(**arguments)
    config = petl_ext.DASConfig(bottleneck=0, bypass_bottleneck=2, sites=[r"layers\.\d+"])
    return model, petl_ext.attach(model, config, keep=["head"])


class Placed(nn.Module):
    """A stack of `PROMPTED_LAYERS` layers; entering at layer K, an image's vector goes through what is left of them."""

    def __init__(self, best=0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.insert_layer, self.num_layers, self.best = 0, PROMPTED_LAYERS, best
        self.candidates = nn.ModuleList(nn.Linear(4, 4) for _ in range(PROMPTED_LAYERS))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, image):
        # Only what enters at the best layer arrives; elsewhere all but a tenth of it is noise.
        noise = 0.0 if self.insert_layer == self.best else 3.0
        seen = self.candidates[self.insert_layer](image)
        return self.head(self.dropout(seen) + noise * torch.randn_like(seen))


def json_copy(state):
    return json.loads(json.dumps(state, allow_nan=False))
