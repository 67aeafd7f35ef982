"""RMS norms as people write them, and near misses."""

import torch
import torch.nn.functional as F
from torch import nn


class _Norm(nn.Module):
    def __init__(self, columns, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(columns))
        self.eps = eps


class Llama(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Meta(_Norm):
    """As in the first Llama's own file."""

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


class Gemma(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class Plain(_Norm):
    """Of tutorials: no casts."""

    def forward(self, x):
        return self.weight * (x / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + self.eps))


class Square(_Norm):
    def forward(self, x):
        h = x.float()
        rms = (h * h).mean(dim=-1, keepdim=True).add(self.eps).rsqrt()
        return (h * rms * self.weight.float()).to(x.dtype)


class Weightless(nn.Module):
    def __init__(self, columns, eps=1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        h = x.to(torch.float32)
        return (h * torch.rsqrt(h.square().mean(-1, True) + self.eps)).to(x.dtype)


def normalized(h, eps):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


class ByFunction(_Norm):
    def forward(self, x):
        return self.weight * normalized(x.to(dtype=torch.float32), self.eps).to(x.dtype)


SPELLINGS = (Llama, Meta, Gemma, Plain, Square, Weightless, ByFunction)


class Centred(_Norm):
    """A layer norm without a bias."""

    def forward(self, x):
        h = x - x.mean(-1, keepdim=True)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps))


class OtherDimension(_Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps))


class EpsOutside(_Norm):
    def forward(self, x):
        return self.weight * (x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + self.eps))


class Cubed(_Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + self.eps))


class OffsetByTwo(_Norm):
    def forward(self, x):
        return (2.0 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Branching(_Norm):
    def forward(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        if x.dim() == 3:
            return h
        return self.weight * h


class Normalize(_Norm):
    def forward(self, x):
        return F.normalize(x, dim=-1) * x.size(-1) ** 0.5 * self.weight


NEAR_MISSES = (Centred, OtherDimension, EpsOutside, Cubed, OffsetByTwo, Branching, Normalize)
