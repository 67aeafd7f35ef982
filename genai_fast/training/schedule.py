"""The learning rate over the steps of a run."""

import math
from typing import Any

import torch
from torch import nn

from genai_fast.config import Config
from genai_fast.contract import AdaptsRates, networks_of, offers


class Schedule:
    """Rises linearly over `config.warmup` steps, a tenth of the run at most; then, by `config.decay`, stays ("none"),
    falls to a tenth along a cosine, or stays for the first half of the run and falls linearly towards 0 in the second,
    which it would reach at the step after the last ("linear").

    Each group keeps its own rate as the peak; of a `model` that adapts rates, times its factor for the group's network.
    A rate that is a tensor is changed in place, as a captured graph asks.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: Config, steps: int, model: nn.Module | None = None
    ) -> None:
        self._model: Any = model if offers(model, AdaptsRates) and model.rate_factors() else None  # type: ignore
        self._groups = optimizer.param_groups
        for group in self._groups:  # the key that torch's own schedulers use; a restored group has it
            group.setdefault("initial_lr", float(group["lr"]))
        self._warmup, self._decay, self._steps = min(config.warmup, steps // 10), config.decay, steps
        self._constant = not self._warmup and self._decay == "none" and self._model is None

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
        own = self._own_factors()
        for group in self._groups:
            rate, own_factor = group["initial_lr"] * self.factor(step), own.get(id(group["params"][0]))
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
                if own_factor is not None:  # on the device, without waiting for it
                    group["lr"].mul_(own_factor)
            else:
                group["lr"] = rate if own_factor is None else rate * float(own_factor)

    def after(self, losses: Any) -> None:
        """A step has had these losses."""
        if self._model is not None:
            self._model.adapt_rates(losses)

    def _own_factors(self) -> dict[int, torch.Tensor]:
        """The ids of parameters -> what their model multiplies their rates by."""
        if self._model is None:
            return {}
        factors = self._model.rate_factors()
        networks = networks_of(self._model).items()
        return {id(p): factors[name] for name, network in networks if name in factors for p in network.parameters()}
