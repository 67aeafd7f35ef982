"""A model in several processes: each has its rows of every batch, and gradients are averaged by PyTorch.

That is DistributedDataParallel or, with `--shard`, FSDP2. Losses, updates and checkpoints are those of one process on
the joined batch; DISTRIBUTED.md says where they are not. In one process none of this runs.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genai_fast.config import Config
from genai_fast.contract import Carries, HasNetworks, offers
from genai_fast.training import distributed, loss_output
from genai_fast.training.optimizer import make_optimizer
from genai_fast.training.step import Step


def placed(model: nn.Module, device: torch.device, settings: Config) -> nn.Module:
    """The model on its device, with the batch norm that `sync_bn` wants; one that is to be sharded stays on the CPU."""
    if distributed.size() > 1 and getattr(settings, "sync_bn", False):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model if distributed.size() > 1 and getattr(settings, "shard", False) else model.to(device)


def sharded(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, settings: Config
) -> torch.optim.Optimizer:
    """If `shard` wants it, the model's weights are divided among the processes; returns the optimizer for them, in the
    old one's state."""
    if distributed.size() == 1 or not getattr(settings, "shard", False):
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
    """Weights, gradients and optimizer state, group by group of `contract.Shards`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distributed.size(),))
    # Matrices travel as autocast would round them; norms, embeddings and the sums of gradients stay float32.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for modules in model.shards():
        fully_shard(modules, mesh=mesh, mp_policy=policy if bfloat16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "training_step")


def is_sharded(model: nn.Module) -> bool:
    return hasattr(next(model.parameters()), "full_tensor")


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of one that is sharded a copy on the CPU; all processes must ask."""
    return x.full_tensor().cpu() if hasattr(x, "full_tensor") else x


def not_finite(model: nn.Module) -> list[str]:
    """State-dict names of tensors that are not finite in some process; all processes must call."""
    state = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in model.state_dict().items()}
    found = [name for name, x in state.items() if not x.isfinite().all()]
    if distributed.size() == 1:
        return found
    each: list[list[str]] = [[] for _ in range(distributed.size())]
    dist.all_gather_object(each, found)
    return [name for names in each for name in names]


def whole_model(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """For the first process a model that works by itself: itself, or of a sharded one a copy; all must ask."""
    if not is_sharded(model):
        return model
    state = {name: whole(x) for name, x in model.state_dict().items()}
    if not distributed.first():
        return model
    with torch.random.fork_rng([]):
        copy = build()
    copy.load_state_dict(state)
    return copy


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimizer as `checkpoint.save` takes them, with what all processes have of them; all must ask."""
    if distributed.size() == 1:
        return model, optimizer
    distributed.same_buffers(model)
    weights = {name: whole(x) for name, x in model.state_dict().items()}
    settings = optimizer.state_dict()
    settings["state"] = {k: {name: whole(x) for name, x in s.items()} for k, s in settings["state"].items()}
    found = SimpleNamespace(state_dict=lambda: weights, parameters=model.parameters)
    if offers(model, Carries):
        carried = {name: _joined(x) for name, x in model.carried().items()}
        found.carried, found.load_carried = lambda: carried, model.load_carried
    return found, SimpleNamespace(state_dict=lambda: settings)


def _joined(x: torch.Tensor) -> torch.Tensor:
    """All processes' rows of what a model carries, [layers, rows, ...], each having as many."""
    parts = [torch.empty_like(x) for _ in range(distributed.size())]
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
    if distributed.size() == 1:
        yield
        return
    device = next(model.parameters()).device
    distributed.same_noise(device)
    if is_sharded(model):
        yield
        return
    distributed.same_buffers(model)
    if offers(model, Carries):
        carried = model.carried().items()
        model.load_carried({name: x.tensor_split(distributed.size(), 1)[dist.get_rank()] for name, x in carried})
    parts = model.networks() if offers(model, HasNetworks) else {"training_step": _TrainingStep(model)}
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
        self._weights = None
        result = super().__call__(*batch)
        return distributed.joint(result, len(batch[0]), self._weights)

    def _take_turn(self, result: Any, parts: list[tuple[tuple[torch.Tensor, ...], int]]) -> Any:
        self._weights = distributed.weights_of(result, len(parts[0][0][0]))
        self._weight = self._weights[loss_output.place(result)]
        return super()._take_turn(result, parts)

    def _backward(self, parameters: list[nn.Parameter], loss: torch.Tensor) -> None:
        weight = self._weight.double()
        sums = torch.stack([torch.where(weight > 0, loss.detach() * weight, 0.0), weight])
        dist.all_reduce(sums)
        self._joint_loss = sums[0] / sums[1]
        # Gradients are averaged with equal weights.
        super()._backward(parameters, loss * (weight * distributed.size() / sums[1]).to(loss.dtype))

    def _update(self, parameters: list[nn.Parameter], loss: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        super()._update(parameters, self._joint_loss, factor)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Step:
    """A `Step`, of this process or of all."""
    if distributed.size() > 1:
        return JointStep(model, optimizer, **settings)
    graph = None if isinstance(optimizer, torch.optim.Adam) else False  # RMSprop has no form that a graph could hold
    return Step(model, optimizer, graph=graph, **settings)
