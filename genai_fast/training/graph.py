"""A training step as CUDA graphs, one for each shape of batch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from genai_fast.backends import FallbackWarning
from genai_fast.capture import aside, capture
from genai_fast.errors import UsageError
from genai_fast.training import loss_output

Batch = tuple[torch.Tensor, ...]

_WARM_UP = 3  # plain steps of a shape before its capture: libraries and the optimizer set themselves up


class Graphs:
    """Runs `body(*batch)` plainly at first, then as a captured CUDA graph; the results are the same.

    Args:
        body: a whole step, on tensors that lie where and as `place` puts them.
        ready: whether it may be captured by now.
        optimizers: whose step is in it. Rates that are numbers become tensors, which schedulers fill; if another
            setting changes, or a state is loaded, the graphs are captured again.
        limit: shapes that get a graph; batches of further shapes run plainly.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        place: Callable[[torch.Tensor], torch.Tensor],
        ready: Callable[[], bool],
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        limit: int,
    ) -> None:
        self._body, self._place, self._ready, self._device, self._limit = body, place, ready, device, limit
        self._optimizers = optimizers
        self._rates = [_on_device(group["lr"], device) for o in optimizers for group in o.param_groups]
        self._settings = self._read_settings()
        self._refused = False
        self._forget()

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, *batch: torch.Tensor) -> Any:
        settings = self._read_settings()
        if settings != self._settings:
            if self._seen:
                _say("Step captures its CUDA graphs again, after a warm-up: state or settings of an optimizer changed")
            self._settings = settings
            self._forget()
        shapes = tuple((x.shape, x.dtype) for x in batch)
        if shapes in self._captured:
            inputs, replay = self._captured[shapes]
            for static, x in zip(inputs, batch, strict=True):
                static.copy_(x, non_blocking=True)
            return replay()
        batch = tuple(map(self._place, batch))
        if self._refused or len(self._captured) == self._limit:
            return self._body(*batch)
        self._seen[shapes] += 1
        if self._seen[shapes] <= _WARM_UP or not self._ready():
            with aside(self._device):
                return self._body(*batch)
        inputs = tuple(x.clone() for x in batch)  # in the layout that they have
        self._drop_gradients()  # they must be born inside the graph, in memory that only graphs use
        raised: list[Exception] = []

        def body() -> Any:
            try:
                return self._body(*inputs)
            except Exception as error:
                raised.append(error)
                raise

        try:
            replay, self._pool = _capture(body, self._device, self._pool)
        except Exception as error:  # whatever it is: if it is not about the capture, the plain step raises it again
            self._refused = True
            self._forget()
            cause = raised[0] if raised else error  # the end of a broken capture raises too
            reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
            _say(f"Step runs without a CUDA graph from here on: its capture raised {reason}")
            return self._body(*batch)
        finally:
            self._drop_gradients()  # their memory is the next graph's too
        self._captured[shapes] = inputs, replay
        return replay()

    def _forget(self) -> None:
        self._captured: dict[tuple, tuple[Batch, Callable[[], Any]]] = {}
        self._seen: Counter[tuple] = Counter()
        self._pool: Any = None

    def _drop_gradients(self) -> None:
        for group in self._groups:
            for p in group["params"]:
                p.grad = None

    def _read_settings(self) -> list[tuple]:
        """What a graph has frozen: numbers by value, tensors by identity. Rates go where graphs read them."""
        # New ones after load_state_dict, which replaces the state too; held, so that no other gets their ids.
        self._groups = [group for o in self._optimizers for group in o.param_groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate
        names = [o.defaults.keys() - {"lr"} for o in self._optimizers for _ in o.param_groups]
        return [
            (id(group), {k: id(group[k]) if isinstance(group[k], torch.Tensor) else group[k] for k in keys})
            for group, keys in zip(self._groups, names, strict=True)
        ]


def _on_device(rate: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if not isinstance(rate, torch.Tensor):
        return torch.tensor(rate, device=device)
    if rate.device != device:
        raise UsageError(f"Step: optimizer: lr: expected a number or a tensor on {device}, got one on {rate.device}")
    return rate


def _say(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)  # the caller of the Step


def _capture(body: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Callable[[], Any], Any]:
    """Record body() as a CUDA graph; what is returned replays it and gives copies of body()'s losses, and its pool."""

    def entries() -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        result = body()
        values = loss_output.entries(result)
        return result, values, torch.stack(values)

    pool = pool or torch.cuda.graph_pool_handle()
    graph, (result, values, together) = capture(entries, device, pool)
    dtypes = [x.dtype for x in values]

    def replay() -> Any:
        graph.replay()
        copies = together.clone().unbind()
        return loss_output.like(result, [x.to(dtype) for x, dtype in zip(copies, dtypes, strict=True)])

    return replay, pool
