"""One optimizer step: plain on the CPU, one captured CUDA graph on a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from genai_fast.optim import Adam
from genai_fast.training.config import Config

_WARM_UP = 3  # plain steps before the capture: libraries and the optimizer set themselves up


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of every recipe: Adam in one call; on CUDA torch's, with its step count there for graph capture."""
    if next(model.parameters()).is_cuda:
        return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True, capturable=True)
    return Adam(model.parameters(), lr=config.lr)


class Step:
    """zero_grad, forward, backward, clipping and the optimizer's step as one call.

    `step(*batch)` calls `model.training_step(*batch)`, which returns a NamedTuple of 0-d tensors with a field
    `loss`, and returns that tuple detached, on the device, without synchronizing.

    On CUDA the whole step becomes one graph. The first three steps of a shape run plainly on a side stream:
    they warm up, and they count. Then the step is captured, and each further call copies its batch into the
    graph's inputs and replays it. Random numbers are fresh in each replay, as the graph advances the device's
    default generator. A batch of another shape (an epoch's last one) runs plainly. What the step reads
    besides the batch (weights, optimizer state, schedules) may change only in place; so restore a checkpoint
    before the first step.

    Args:
        model: has `training_step`.
        optimizer: for a graph it must be capturable: `torch.optim.Adam(..., fused=True, capturable=True)`.
        clip: largest 2-norm of the gradient over all parameters; 0 for none.
        graph: capture a CUDA graph; None: where the parameters are on CUDA.

    Raises:
        ValueError: a graph is wanted and the optimizer or the model's device cannot serve.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        graph: bool | None = None,
    ) -> None:
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._graphed = all(p.is_cuda for p in self._parameters) if graph is None else graph
        if self._graphed and not all(group.get("capturable") for group in optimizer.param_groups):
            raise ValueError(
                "Step: optimizer: a CUDA graph needs a capturable one, got capturable=False;"
                " remedy: torch.optim.Adam(..., fused=True, capturable=True) or graph=False"
            )
        self._device = self._parameters[0].device
        self._plain_steps: Counter[tuple] = Counter()  # by the batch's shapes
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._replay: Callable[[], Any] | None = None

    def __call__(self, *batch: torch.Tensor) -> Any:
        if self._replay is not None and _shapes(batch) == _shapes(self._inputs):
            for static, x in zip(self._inputs, batch, strict=True):
                static.copy_(x, non_blocking=True)
            return self._replay()
        batch = tuple(x.to(self._device, non_blocking=True) for x in batch)
        if not self._graphed or self._replay is not None:
            return self._plain(*batch)
        self._plain_steps[_shapes(batch)] += 1
        if self._plain_steps[_shapes(batch)] <= _WARM_UP:
            with _side_stream(self._device):
                return self._plain(*batch)
        self._inputs = tuple(x.clone() for x in batch)
        # Gradients must be born inside the graph, in memory that only it uses.
        self.optimizer.zero_grad(set_to_none=True)
        self._replay = _capture(lambda: self._plain(*self._inputs))
        return self._replay()

    def _plain(self, *batch: torch.Tensor) -> Any:
        for p in self._parameters:
            p.grad = None
        losses = self.model.training_step(*batch)
        losses.loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self._parameters, self.clip)
        self.optimizer.step()
        return type(losses)(*(x.detach() for x in losses))


def _shapes(batch: tuple[torch.Tensor, ...]) -> tuple:
    return tuple((x.shape, x.dtype) for x in batch)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one only: each stream keeps memory of its own


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run on another stream, in order with this one: capture asks for a warm-up off the default stream."""
    current, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def _capture(body: Callable[[], Any]) -> Callable[[], Any]:
    """Record body() as a CUDA graph; what it returns replays it and gives copies of body()'s losses."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (a loader that pins memory) may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        losses = body()
        together = torch.stack(tuple(losses))

    def replay() -> Any:
        graph.replay()
        return type(losses)(*together.clone().unbind())

    return replay
