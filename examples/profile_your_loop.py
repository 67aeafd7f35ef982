"""A loop for the profiler: genai-fast profile examples/profile_your_loop.py:train --compare eager,fused"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


def train(prepare: Callable[[nn.Module], nn.Module]) -> Iterator[int]:
    """Steps of a small classifier; what is yielded is the number of samples in each."""
    torch.manual_seed(0)
    model = prepare(
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10),
        )
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    while True:
        x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(x)
