"""The optimizer of every recipe, and which optimizer updates what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from genai_fast.contract import networks_of
from genai_fast.errors import UsageError
from genai_fast.optim import Adam, AdamW

if TYPE_CHECKING:
    from genai_fast.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of every recipe: Adam in one call; on CUDA torch's, with its step count there for graph capture.

    A model with `networks()`, name -> module, gets a group of parameters for each, whose rate is `config.lr_<name>` if
    there is such a setting and it is not 0. `config.weight_decay` makes it AdamW; vectors (biases, norms) do not decay.
    `config.optimizer` "rmsprop", where there is such a setting, takes RMSprop as Keras has it by default.

    Raises UsageError: RMSprop with weight decay.
    """
    on_cuda, sharded = next(model.parameters()).is_cuda, hasattr(next(model.parameters()), "full_tensor")
    groups = []
    for name, network in networks_of(model).items():
        rate = getattr(config, f"lr_{name}", 0.0) or config.lr
        parameters = list(network.parameters())
        decaying = [p for p in parameters if p.dim() > 1] if config.weight_decay else []
        others = [p for p in parameters if p.dim() <= 1] if decaying else parameters
        for members, decay in ((decaying, config.weight_decay), (others, 0.0)):
            if members:
                # A tensor, so that a captured graph reads the rate of the day.
                lr = torch.tensor(rate, device=members[0].device) if on_cuda else rate
                groups.append({"params": members, "lr": lr, "weight_decay": decay})
    if getattr(config, "optimizer", "adam") == "rmsprop":
        if config.weight_decay:
            raise UsageError(f"--weight-decay: expected 0 with --optimizer rmsprop, got {config.weight_decay:g}")
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=0.9, eps=1e-7)
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    if on_cuda or sharded:
        options |= {"fused": True, "capturable": True} if on_cuda else {}
        return (torch.optim.AdamW if config.weight_decay else torch.optim.Adam)(groups, **options)
    return (AdamW if config.weight_decay else Adam)(groups, **options)


def owners(optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, int]:
    """The ids of all parameters -> the number of their optimizer.

    Raises UsageError: something is no optimizer, wants a closure, or shares parameters with another.
    """
    owner: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError(
                f"Step: optimizer: expected one whose step() takes no closure, got {type(optimizer).__name__}"
            )
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if owner.setdefault(id(p), number) != number:
                raise UsageError(
                    f"Step: optimizers: expected disjoint parameters, got one of shape {tuple(p.shape)} in two of them"
                )
    if not owner:
        raise UsageError("Step: optimizer: expected one with parameters, got none")
    return owner
