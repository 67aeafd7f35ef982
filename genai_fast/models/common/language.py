"""What language models share besides generation: the loss by their head, and a head that is tied to the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from genai_fast import ops
from genai_fast.fusion.chains import untouched
from genai_fast.models.common.submodules import share, shared_parameters

# Logits of a step that are held as a whole; more would take 2 GiB in float32. By chunks head and loss take longer: on
# two AVX-512 cores, 1024 tokens of 50257, 10 % in float32, 40 % in bfloat16.
MOST_LOGITS = 1 << 29


def head_loss(head: nn.Module, features: torch.Tensor, y: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The mean cross-entropy of y [B, T] given head(features [B, T, C]); positions where y is -100 do not count."""
    if y.numel() * vocabulary > MOST_LOGITS and untouched(head, nn.Linear):
        return ops.linear_cross_entropy(features, head.weight, y, head.bias)
    return ops.cross_entropy(head(features), y, inplace=True)


class TiedHead(nn.Module):
    """Keeps parameters that have several names one, such as the head's and the embedding's.

    A model's `lm_head` has the weight of the module `embedding`, if `tie_head` was called.
    """

    embedding: str

    def tie_head(self) -> None:
        self.lm_head.weight = self.get_submodule(self.embedding).weight
        self._shared: list[Any] = []  # during load_state_dict
        self.register_load_state_dict_pre_hook(_with_head)
        self.register_load_state_dict_post_hook(_tied_after_load)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TiedHead:
        shared = shared_parameters(self)
        super()._apply(fn, recurse)
        share(shared)  # a move that cannot keep a Parameter (from "meta") makes one for each of its names
        return self


def _with_head(model: TiedHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state without the tied head says it all by the embedding."""
    model._shared = shared_parameters(model)
    embedding = state.get(f"{prefix}{model.embedding}.weight")
    one = model.lm_head._parameters.get("weight")
    tied = one is not None and one is model.get_submodule(model.embedding)._parameters.get("weight")
    if embedding is not None and tied:
        state.setdefault(f"{prefix}lm_head.weight", embedding)


def _tied_after_load(model: TiedHead, _: Any) -> None:
    share(model._shared)  # load_state_dict(assign=True) makes a parameter for each name
    model._shared = []
