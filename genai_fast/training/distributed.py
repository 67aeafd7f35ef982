"""Training in several processes that torchrun has started, one a device: each has its rows of every batch.

Gradients are averaged by PyTorch's DistributedDataParallel, or by FSDP2 (`--shard`). Losses, updates and checkpoints
are those of one process on the joined batch; DISTRIBUTED.md says where they are not. In one process none of this runs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genai_fast.errors import UsageError
from genai_fast.ops import rows
from genai_fast.training.config import Config
from genai_fast.training.optimizer import make_optimizer
from genai_fast.training.step import Step

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

    Raises:
        UsageError: a variable of torchrun's, a GPU or the settings do not serve.
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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // beside))
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
    """All processes read the same data.

    Raises:
        UsageError: this one did not.
    """
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
    """All processes' default generators go on as the first one's."""
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
    """This process's rows of a batch of so many; where there are too few, one that another process has."""
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
    """Inside, this process has its rows of a batch of so many."""
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


def joint(losses: Any, weight: float) -> Any:
    """The losses of the joined batch, of which this process's part weighs so much: a NamedTuple as `losses` is."""
    if size() == 1:
        return losses
    values = torch.stack(tuple(losses)).detach().double()
    weights = torch.stack([_weight(losses, name, weight) for name in losses._fields])
    sums = torch.stack([torch.where(weights > 0, values * weights, 0.0), weights])
    dist.all_reduce(sums)
    return type(losses)(*(sums[0] / sums[1]).float())


def _weight(losses: Any, name: str, weight: float) -> torch.Tensor:
    own = rows.mine()
    weight = torch.full_like(
        losses.loss if hasattr(losses, "loss") else losses[0], 0.0 if own.idle else weight
    ).double()
    # A mean over the tokens of padded texts, of which each process has another number.
    return weight * losses.tokens if name == "loss" and hasattr(losses, "nats") else weight


# The model in several processes.


def placed(model: nn.Module, device: torch.device, settings: Config) -> nn.Module:
    """The model on its device, with the batch norm that `sync_bn` wants; one that is to be sharded stays on the CPU."""
    if size() > 1 and getattr(settings, "sync_bn", False):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model if size() > 1 and getattr(settings, "shard", False) else model.to(device)


def sharded(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, settings: Config
) -> torch.optim.Optimizer:
    """If `shard` wants it, the model's weights are divided among the processes; returns the optimizer for them, in the
    old one's state."""
    if size() == 1 or not getattr(settings, "shard", False):
        return optimizer
    from torch.distributed.tensor import distribute_tensor

    before = optimizer.state_dict()
    _shard(model, device, settings.precision == "bfloat16")
    optimizer = make_optimizer(model, settings)
    after = optimizer.state_dict()
    weights = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for k, tensors in before["state"].items():
        p = weights[k]
        after["state"][k] = {
            name: distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None) if x.dim() else x
            for name, x in tensors.items()
        }
    for group, old in zip(after["param_groups"], before["param_groups"], strict=True):
        group |= {"initial_lr": old["initial_lr"]} if "initial_lr" in old else {}
    optimizer.load_state_dict(after)
    return optimizer


def _shard(model: nn.Module, device: torch.device, bfloat16: bool) -> None:
    """A GPT's weights, gradients and optimizer state, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (size(),))
    # Matrices travel as autocast would round them; norms, embeddings and the sums of gradients stay float32.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy if bfloat16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "training_step")


def is_sharded(model: nn.Module) -> bool:
    return hasattr(next(model.parameters()), "full_tensor")


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; all processes must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def not_finite(model: nn.Module) -> list[str]:
    """The names in its state dict of what is not finite, in any process; all must ask."""
    state = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in model.state_dict().items()}
    found = [name for name, x in state.items() if not x.isfinite().all()]
    if size() == 1:
        return found
    each: list[list[str]] = [[] for _ in range(size())]
    dist.all_gather_object(each, found)
    return [name for names in each for name in names]


def whole_model(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """For the first process a model that works by itself: itself, or of a sharded one a copy; all must ask."""
    if not is_sharded(model):
        return model
    state = {name: whole(x).cpu() for name, x in model.state_dict().items()}
    if not first():
        return model
    with torch.random.fork_rng([]):
        copy = build()
    copy.load_state_dict(state)
    return copy


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimizer as `checkpoint.save` takes them, with what all processes have of them; all must ask."""
    if size() == 1:
        return model, optimizer
    same_buffers(model)
    weights = {name: whole(x) for name, x in model.state_dict().items()}
    settings = optimizer.state_dict()
    settings["state"] = {k: {name: whole(x) for name, x in s.items()} for k, s in settings["state"].items()}
    found = SimpleNamespace(state_dict=lambda: weights, parameters=model.parameters)
    if hasattr(model, "carried"):
        carried = {name: _joined(x) for name, x in model.carried().items()}
        found.carried = lambda: carried
    return found, SimpleNamespace(state_dict=lambda: settings)


def _joined(x: torch.Tensor) -> torch.Tensor:
    """All processes' rows of what a model carries, [layers, rows, ...], each having as many."""
    parts = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


class _TrainingStep(nn.Module):
    """DistributedDataParallel wants what is trained to be a `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self._step = model, model.training_step

    def forward(self, *batch: torch.Tensor) -> Any:
        return self._step(*batch)


class _Parallel(DistributedDataParallel):
    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        """PyTorch's refuses SyncBatchNorm on a CPU, where the fused blocks serve it."""


@contextlib.contextmanager
def averaging(model: nn.Module) -> Iterator[None]:
    """Inside, gradients of the model, or of each of its networks, are averaged over the processes."""
    if size() == 1:
        yield
        return
    device = next(model.parameters()).device
    same_noise(device)
    if is_sharded(model):
        yield
        return
    same_buffers(model)
    if hasattr(model, "carried"):
        carried = model.carried().items()
        model.load_carried({name: x.tensor_split(size(), 1)[dist.get_rank()] for name, x in carried})
    parts = model.networks() if hasattr(model, "networks") else {"training_step": _TrainingStep(model)}
    for name, part in parts.items():
        # Found before the class's or the registered one of this name; so calls pass through it, while state dict, modes
        # and parameters are the model's own. Weights are alike already, by seed or checkpoint.
        model.__dict__[name] = parallel = _Parallel(part, init_sync=False)
        parallel.broadcast_buffers = False  # the argument of this name is deprecated, its successor not in torch 2.11
    try:
        yield
    finally:
        for name in parts:
            del model.__dict__[name]


class JointStep(Step):
    """A step of several processes: it returns the losses of the joined batch, and all skip what one would skip.

    It is not captured as a CUDA graph.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        super().__init__(model, optimizer, graph=False, module=model, **settings)
        self._deferred = self._deferred and not is_sharded(model)
        self._weight = self._joint_loss = torch.ones((), device=self._device)  # of networks in turns: whole batches

    def __call__(self, *batch: torch.Tensor) -> Any:
        return joint(super().__call__(*batch), len(batch[0]))

    def _take_turn(self, result: Any, parts: list[tuple[tuple[torch.Tensor, ...], float]]) -> Any:
        self._weight = _weight(result, "loss", len(parts[0][0][0]))
        return super()._take_turn(result, parts)

    def _backward(self, parameters: list[nn.Parameter], loss: torch.Tensor) -> None:
        weight = self._weight.double()
        sums = torch.stack([torch.where(weight > 0, loss.detach() * weight, 0.0), weight])
        dist.all_reduce(sums)
        self._joint_loss = sums[0] / sums[1]
        # Gradients are averaged with equal weights.
        super()._backward(parameters, loss * (weight * size() / sums[1]).to(loss.dtype))

    def _update(self, parameters: list[nn.Parameter], loss: torch.Tensor) -> None:
        super()._update(parameters, self._joint_loss)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Step:
    """A `Step`, of this process or of all."""
    return (Step if size() == 1 else JointStep)(model, optimizer, **settings)
