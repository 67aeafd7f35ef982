"""The learning rate over the steps of a run."""

import math

import torch

from genai_fast.config import Config


class Schedule:
    """Rises linearly over `config.warmup` steps, a tenth of the run at most; then, by `config.decay`, stays ("none"),
    falls to a tenth along a cosine, or stays for the first half of the run and falls linearly towards 0 in the second,
    which it would reach at the step after the last ("linear").

    Each group keeps its own rate as the peak. A rate that is a tensor is changed in place, as a captured graph asks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, steps: int) -> None:
        self._groups = optimizer.param_groups
        for group in self._groups:  # the key that torch's own schedulers use; a restored group has it
            group.setdefault("initial_lr", float(group["lr"]))
        self._warmup, self._decay, self._steps = min(config.warmup, steps // 10), config.decay, steps
        self._constant = not self._warmup and self._decay == "none"

    def factor(self, step: int) -> float:
        """Of the peak, at a step counted from 0."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        if self._decay == "none":
            return 1.0
        if self._decay == "linear":
            half = self._steps // 2
            return min(1.0, max(self._steps - step, 0) / (self._steps - half))
        done = (step - self._warmup) / max(self._steps - self._warmup, 1)
        return 0.55 + 0.45 * math.cos(math.pi * min(done, 1.0))

    def set(self, step: int) -> None:
        if self._constant:
            return
        for group in self._groups:
            rate = group["initial_lr"] * self.factor(step)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
