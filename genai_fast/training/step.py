"""One optimizer step: plain on the CPU, one captured CUDA graph on a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import nn

from genai_fast.optim import Adam, AdamW
from genai_fast.training.config import Config

_WARM_UP = 3  # plain steps before the capture: libraries and the optimizer set themselves up


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of every recipe: Adam in one call; on CUDA torch's, with its step count there for graph capture.

    A model with `networks()`, name -> module, gets a group of parameters for each, whose rate is `config.lr_<name>`
    if there is such a setting and it is not 0. `config.weight_decay` makes it AdamW; vectors (biases, norms) do not
    decay.
    """
    networks = model.networks() if hasattr(model, "networks") else {"": model}
    on_cuda, sharded = next(model.parameters()).is_cuda, hasattr(next(model.parameters()), "full_tensor")
    groups = []
    for name, network in networks.items():
        rate = getattr(config, f"lr_{name}", 0.0) or config.lr
        parameters = list(network.parameters())
        decaying = [p for p in parameters if p.dim() > 1] if config.weight_decay else []
        others = [p for p in parameters if p.dim() <= 1] if decaying else parameters
        for members, decay in ((decaying, config.weight_decay), (others, 0.0)):
            if members:
                # A tensor, so that a captured graph reads the rate of the day.
                lr = torch.tensor(rate, device=members[0].device) if on_cuda else rate
                groups.append({"params": members, "lr": lr, "weight_decay": decay})
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    if on_cuda or sharded:
        options |= {"fused": True, "capturable": True} if on_cuda else {}
        return (torch.optim.AdamW if config.weight_decay else torch.optim.Adam)(groups, **options)
    return (AdamW if config.weight_decay else Adam)(groups, **options)


class Step:
    """One step of training as one call: zero_grad, forward, backward, clipping and the optimizer's step, for each turn.

    `step(*batch)` calls `model.training_step(*batch)`, which returns a NamedTuple of 0-d tensors with a field
    `loss`, and returns that tuple detached, on the device, without synchronizing. A model with networks that
    play against each other has `turns(*batch)` instead: a generator that yields (parameters, loss) for each
    update, in order, and returns the NamedTuple; it goes on when those parameters have been updated. All
    parameters belong to one optimizer, which updates those that have a gradient.

    A loss that is infinite or NaN updates nothing: the turn is skipped and counted (`skipped()`).

    On CUDA the whole step becomes one graph. The first three steps of a shape run plainly on a side stream:
    they warm up, and they count. Then the step is captured, and each further call copies its batch into the
    graph's inputs and replays it. Random numbers are fresh in each replay, as the graph advances the device's
    default generator. A batch of another shape (an epoch's last one) runs plainly. What the step reads
    besides the batch (weights, optimizer state, schedules) may change only in place; so restore a checkpoint
    before the first step.

    Args:
        model: has `training_step` or `turns`; `after_step()`, if it has that, is called at the end.
        optimizer: for a graph it must be capturable and fused: `torch.optim.Adam(..., fused=True, capturable=True)`.
        clip: largest 2-norm of the gradient over the parameters of a turn; 0 for none.
        bfloat16: compute the losses under autocast to bfloat16.
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
        bfloat16: bool = False,
        graph: bool | None = None,
    ) -> None:
        self.model, self.optimizer, self.clip, self.bfloat16 = model, optimizer, clip, bfloat16
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._graphed = all(p.is_cuda for p in self._parameters) if graph is None else graph
        for need in ("capturable", "fused") if self._graphed else ():
            if not all(group.get(need) for group in optimizer.param_groups):
                raise ValueError(
                    f"Step: optimizer: a CUDA graph needs a capturable and fused one, got {need}=False;"
                    f" remedy: torch.optim.Adam(..., fused=True, capturable=True) or graph=False"
                )
        self._device = self._parameters[0].device
        images = [p for p in self._parameters if p.dim() == 4 and not p.is_contiguous()]
        last = any(p.is_contiguous(memory_format=torch.channels_last) for p in images)
        self._layout = torch.channels_last if last else torch.preserve_format
        self._turns = model.turns if hasattr(model, "turns") else self._only_turn
        self._after = getattr(model, "after_step", None)
        self._skipped = torch.zeros(2, device=self._device)  # turns in all, steps in a row
        # torch's fused Adam decides on the device whether to update, as in mixed precision: asking would wait.
        self._deferred = self._device.type == "cuda" and all(g.get("fused") for g in optimizer.param_groups)
        self._plain_steps: Counter[tuple] = Counter()  # by the batch's shapes
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._replay: Callable[[], Any] | None = None

    def __call__(self, *batch: torch.Tensor) -> Any:
        if self._replay is not None and _shapes(batch) == _shapes(self._inputs):
            for static, x in zip(self._inputs, batch, strict=True):
                static.copy_(x, non_blocking=True)
            return self._replay()
        batch = tuple(self._placed(x) for x in batch)
        if not self._graphed or self._replay is not None:
            return self._plain(*batch)
        self._plain_steps[_shapes(batch)] += 1
        if self._plain_steps[_shapes(batch)] <= _WARM_UP:
            with _side_stream(self._device):
                return self._plain(*batch)
        self._inputs = tuple(x.clone() for x in batch)  # in the layout that they have
        # Gradients must be born inside the graph, in memory that only it uses.
        self.optimizer.zero_grad(set_to_none=True)
        self._replay = _capture(lambda: self._plain(*self._inputs))
        return self._replay()

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        """On the model's device, images in the memory layout of its convolutions."""
        if x.dim() == 4:
            return x.to(self._device, non_blocking=True, memory_format=self._layout)
        return x.to(self._device, non_blocking=True)

    def skipped(self) -> tuple[int, int]:
        """Turns skipped so far, and steps in a row up to now that skipped one; waits for the device."""
        total, row = self._skipped.tolist()
        return int(total), int(row)

    def _plain(self, *batch: torch.Tensor) -> Any:
        turns = self._turns(*batch)
        total, row = self._skipped
        before = total.clone()
        while True:
            try:
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self.bfloat16):
                    parameters, loss = next(turns)
            except StopIteration as end:
                losses = end.value
                break
            self._update(parameters, loss)
        row.add_(1).mul_(total > before)
        if self._after is not None:
            self._after()
        return type(losses)(*(x.detach() for x in losses))

    def _only_turn(self, *batch: torch.Tensor) -> Generator[tuple[list[nn.Parameter], torch.Tensor], None, Any]:
        losses = self.model.training_step(*batch)
        yield self._parameters, losses.loss
        return losses

    def _update(self, parameters: list[nn.Parameter], loss: torch.Tensor) -> None:
        for p in self._parameters:
            p.grad = None
        bad = (~loss.detach().isfinite()).float()
        self._skipped[0] += bad
        if not self._deferred and bad:
            return
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        if self._deferred:
            self.optimizer.found_inf = bad
        self.optimizer.step()


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
