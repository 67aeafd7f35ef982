"""Models, losses and batches of strangers, as the tests of the training step take them."""

import copy
from typing import NamedTuple

import torch
from torch import nn


class Losses(NamedTuple):
    error: torch.Tensor
    loss: torch.Tensor


class Averaged(nn.Module):
    """A user's model: batch norm, and a moving average of its weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, x, y):
        error = nn.functional.mse_loss(self.net(x).float(), y)
        return Losses(error.detach(), 2 * error)

    @torch.no_grad()
    def after_step(self):
        for mean, p in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(p, 0.1)
        for mean, b in zip(self.average.buffers(), self.net.buffers(), strict=True):
            mean.copy_(b)


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count, rows=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 8, generator=generator), torch.randn(rows, 4, generator=generator)) for _ in range(count)
    ]


def mse_of(net):
    return lambda x, y: nn.functional.mse_loss(net(x), y)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def everything(model, optimizer):
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in (*model.state_dict().values(), *state)]
