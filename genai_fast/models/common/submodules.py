"""Submodules whose parameters a model reads for a faster call, if calling the module would do nothing else.

A replaced, parametrized or hooked module (an adapter, a quantized layer) is called.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.fusion.chains import untouched
from genai_fast.layers import LayerNorm, RMSNorm


def linear_gelu(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """GELU (tanh) of linear(x), [..., in] -> [..., out], with the bias added in the activation's pass."""
    if untouched(linear, nn.Linear):
        return ops.bias_gelu(F.linear(x, linear.weight), linear.bias, "tanh")
    return F.gelu(linear(x), approximate="tanh")


def first_rows(embedding: nn.Module, count: int, device: torch.device) -> torch.Tensor:
    """The embeddings [count, C] of the ids 0 to count - 1."""
    if untouched(embedding, nn.Embedding) and embedding.max_norm is None and embedding.padding_idx is None:
        return embedding.weight[:count]
    return embedding(torch.arange(count, device=device))


def norm_of_sum(norm: nn.Module, branch: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(h + branch), h + branch); our own norms take both, and with hooks only the sum."""
    if untouched(norm, LayerNorm) or untouched(norm, RMSNorm):
        return norm(branch, h)
    h = h + branch
    return norm(h), h


def shared_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places (module, name) of each parameter that has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                places.setdefault(id(p), []).append((module, name))
    return [here for here in places.values() if len(here) > 1]


def share(places: list[list[tuple[nn.Module, str]]]) -> None:
    """Put each first place's parameter into the others, where they still exist."""
    for (first, key), *others in places:
        for module, name in others:
            module._parameters[name] = first._parameters[key]
