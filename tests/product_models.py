"""Gated MLPs as people write them, and near misses."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


class _MLP(nn.Module):
    def __init__(self, columns, hidden=128):
        super().__init__()
        self.gate_proj = nn.Linear(columns, hidden, bias=False)
        self.up_proj = nn.Linear(columns, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, columns, bias=False)
        self.act_fn = nn.SiLU()


class Llama(_MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Functional(_MLP):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(_MLP):
    def forward(self, x):
        return self.down_proj(self.up_proj(x) * torch.nn.functional.gelu(self.gate_proj(x), approximate="tanh"))


class InStatements(_MLP):
    def forward(self, x):
        gate = F.gelu(self.gate_proj(x))
        up = self.up_proj(x)
        hidden = gate * up
        return self.down_proj(hidden)


class Chunked(nn.Module):
    """Phi-3's."""

    def __init__(self, columns, hidden=128):
        super().__init__()
        self.gate_up_proj = nn.Linear(columns, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, columns, bias=False)
        self.activation_fn = nn.GELU("tanh")

    def forward(self, hidden_states):
        up_states = self.gate_up_proj(hidden_states)
        gate, up_states = up_states.chunk(2, dim=-1)
        up_states = up_states * self.activation_fn(gate)
        return self.down_proj(up_states)


class _Tanh(nn.Module):
    """As transformers' class."""

    def __init__(self):
        super().__init__()
        self.act = functools.partial(nn.functional.gelu, approximate="tanh")

    def forward(self, input):
        return self.act(input)


class OwnActivation(Llama):
    def __init__(self, columns, hidden=128):
        super().__init__(columns, hidden)
        self.act_fn = _Tanh()


class WithBranch(_MLP):
    def forward(self, x, scale=None):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if scale is not None:
            hidden = hidden * scale
        return self.down_proj(hidden)


SPELLINGS = (Llama, Functional, UpFirst, InStatements, Chunked, OwnActivation, WithBranch)


class Relu(_MLP):
    """Whose gate may be changed in place: relu keeps its result."""

    def forward(self, x):
        return self.down_proj(F.relu(self.gate_proj(x)) * self.up_proj(x))


class Sum(_MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class InPlaceLater(_MLP):
    """The gate is changed while the other factor is computed."""

    def forward(self, x):
        gate = self.gate_proj(x).detach()
        return self.down_proj(F.silu(gate) * gate.mul_(2.0))


class UsedTwice(_MLP):
    def forward(self, x):
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x)) + gate.mean()


class Looked(_MLP):
    def forward(self, x):
        gate = F.silu(self.gate_proj(x))
        assert isinstance(locals()["gate"], torch.Tensor)
        return self.down_proj(gate * self.up_proj(x))


NEAR_MISSES = (Relu, Sum, InPlaceLater, UsedTwice, Looked)
