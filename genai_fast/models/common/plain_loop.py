"""The training loop of every plain model that has a `loss`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def loss_step(model: nn.Module, device: str = "cpu", lr: float = 1e-3) -> Callable[..., torch.Tensor]:
    """zero_grad, loss, backward, step of Adam; returns a function of a batch that does it and returns the loss."""
    model = model.to(device)
    adam = torch.optim.Adam(model.parameters(), lr=lr)

    def step(*batch: torch.Tensor) -> torch.Tensor:
        adam.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        adam.step()
        return loss.detach()

    return step
