"""Processes that torchrun has started, one a device: what they agree on, and whose rows of a batch are whose.

In one process none of this runs. DISTRIBUTED.md says how it is used.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from genai_fast.config import Config
from genai_fast.cpu import allowed_cores
from genai_fast.errors import UsageError
from genai_fast.ops import rows
from genai_fast.training import accumulation, loss_output

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
_PATIENCE = datetime.timedelta(hours=1)  # with the others, who may wait for one that reads data or draws pictures


def size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return size() == 1 or dist.get_rank() == 0


@contextlib.contextmanager
def processes(settings: Config) -> Iterator[None]:
    """Inside, the processes that torchrun started are joined; none, or already joined: nothing.

    Each takes the GPU of its LOCAL_RANK and, unless `settings.threads` says how many, its part of the machine's CPU
    threads.

    Raises UsageError: a variable of torchrun's, a GPU or the settings do not serve.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected {', '.join(missing)} too, as torchrun sets them; remedy:"
            f" torchrun -m genai_fast ..., or unset WORLD_SIZE"
        )
    local, beside = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    device = _device(settings, local)
    _check(settings, int(os.environ["WORLD_SIZE"]))
    if not settings.threads:
        torch.set_num_threads(max(1, allowed_cores() // beside))
    # What the processes agree on goes over the CPUs: reading it must not wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device else "gloo", timeout=_PATIENCE, device_id=device)
    try:
        with warnings.catch_warnings():
            if not first():
                warnings.simplefilter("ignore")
            yield
    finally:
        dist.destroy_process_group()


def _device(settings: Config, local: int) -> torch.device | None:
    """This process's GPU, made the current one; None: the CPU."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"device: expected auto, cpu or cuda, as each of several processes has a GPU of its own, got"
            f" {settings.device!r}"
        )
    if settings.device == "cpu" or not torch.cuda.is_available():
        return None
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"torchrun: expected at most {torch.cuda.device_count()} processes on this machine, one a GPU, got"
            f" LOCAL_RANK={local}; remedy: --nproc-per-node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _check(settings: Config, size: int) -> None:
    if settings.batch_size % size:
        raise UsageError(
            f"--batch-size: expected a multiple of the {size} processes among which a batch is divided, got"
            f" {settings.batch_size}; remedy: --batch-size {-(-settings.batch_size // size) * size}"
        )


# What the processes tell each other.


def agreed(x: Any) -> Any:
    """The first process's x, in all."""
    if size() == 1:
        return x
    told = [x]
    dist.broadcast_object_list(told, device=torch.device("cpu"))
    return told[0]


def check_alike(about: dict[str, Any]) -> None:
    """All processes read the same data. Raises UsageError: this one did not."""
    if (expected := agreed(about)) != about:
        raise UsageError(
            f"process {dist.get_rank()}: expected data as the first process has, {expected}, got {about}; remedy: the"
            f" same files on every machine"
        )


def most(number: int) -> int:
    """The largest of all processes' numbers; all wait for all."""
    if size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@contextlib.contextmanager
def machine_by_machine() -> Iterator[None]:
    """Inside comes first one process of each machine, then the others, who find in its cache what it has left there."""
    others = size() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
    if others:
        most(0)
    yield
    if not others:
        most(0)


def same_noise(device: torch.device) -> None:
    """All processes' default generators continue from the first one's state."""
    if size() == 1:
        return
    state = torch.get_rng_state()
    dist.broadcast(state, 0)
    torch.set_rng_state(state)
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(state, 0)
        torch.cuda.set_rng_state(state.cpu(), device)


@torch.no_grad()
def same_buffers(model: nn.Module) -> None:
    """The first process's running statistics, in all; what is carried from batch to batch stays each one's own."""
    kept = model.state_dict().keys() if size() > 1 else ()
    for name, x in model.named_buffers():
        if name in kept:
            dist.broadcast(x, 0)


# Whose rows of a batch are whose.


def _mine(total: int) -> rows.Rows:
    """This process's rows of a batch of this size; where there are too few, one that another process has."""
    before, end = (place * total // size() for place in (dist.get_rank(), dist.get_rank() + 1))
    return rows.Rows(min(before, total - 1), max(end - before, 1), total, idle=end == before)


def chooser(parts: int) -> Callable[[int], torch.Tensor] | None:
    """What a feed takes as `rows`: this process's rows of each of a batch's equal parts; None: all of them."""
    if size() == 1:
        return None

    def choose(total: int) -> torch.Tensor:
        own = _mine(total // parts)
        inside = torch.arange(own.before, own.before + own.count)
        return (torch.arange(parts)[:, None] * (total // parts) + inside).flatten()

    return choose


def sharing(total: int) -> contextlib.AbstractContextManager[Any]:
    """Inside, this process has its rows of a batch of this size."""
    return contextlib.nullcontext() if size() == 1 else rows.having(_mine(total))


@contextlib.contextmanager
def part_of(batch: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Inside, this process has its rows of that batch; gives them."""
    if size() == 1:
        yield batch
        return
    own = _mine(len(batch[0]))
    with rows.having(own):
        yield tuple(x[own.before : own.before + own.count] for x in batch)


def joint(losses: Any, weight: float, weights: torch.Tensor | None = None) -> Any:
    """The losses of the joined batch, in which this process's rows have this weight: a NamedTuple like `losses`."""
    if size() == 1:
        return losses
    values = torch.stack(tuple(losses)).detach().double()
    weights = weights_of(losses, weight) if weights is None else weights
    sums = torch.stack([torch.where(weights > 0, values * weights, 0.0), weights])
    dist.all_reduce(sums)
    return type(losses)(*(sums[0] / sums[1]).float())


def weights_of(losses: Any, weight: float) -> torch.Tensor:
    """What this process's part of each loss weighs, if its rows weigh `weight`: [losses], float64."""
    device = loss_output.minimised(losses).device
    found = accumulation.weights_of(losses, 0.0 if rows.mine().idle else weight)
    found = torch.stack([torch.as_tensor(w, device=device).double() for w in found])
    return torch.zeros_like(found) if rows.mine().idle else found
