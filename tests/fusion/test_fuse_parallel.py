"""Fused models in two processes: DDP, FSDP2, and SyncBatchNorm against BatchNorm on the joined batch."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from alike import assert_close, assert_gradients, norm_calls, with_statistics
from fuse_models import HandWritten, UNet
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from genai_fast import explain, fuse
from genai_fast.fusion import thresholds
from genai_fast.layers import FusedSequential

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def _start(rank, check, folder):
    torch.set_num_threads(1)
    thresholds._ignored.set(True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    try:
        torch.save(check(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _in_two_processes(check, tmp_path):
    """What `check(rank)` returns in each: pairs (found, expected), one a model. Its own assertions fail the spawn."""
    mp.spawn(_start, (check, str(tmp_path)), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


def _trains_alike(rank, make, shape, wrap):
    plain = make()
    fused = fuse(copy.deepcopy(plain))
    models = [wrap(m) for m in (fused, plain)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-2) for m in models]
    for _ in range(3):
        x = torch.randn(*shape) + rank
        outputs, gradients = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            with norm_calls() as calls:
                outputs.append(model(x))
            assert bool(calls) == (model is models[0])
            outputs[-1].square().sum().backward()
            found = {name: p.grad for name, p in model.named_parameters()}
            gradients.append({name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items()})
            optimizer.step()
        assert_close(*outputs, 1e-4)
        assert_gradients(*gradients)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert_close(*(getattr(t, "full_tensor", lambda t=t: t)() for t in (a, b)), 1e-4, what=name)
    for model in models:
        model.eval()
    with torch.no_grad():
        return models[0](x), models[1](x)


def _fsdp(model):
    for child in model.children():
        if isinstance(child, nn.Sequential):
            fully_shard(child)
    return fully_shard(model)


def _fsdp_checks(rank, make, shape):
    trained = _trains_alike(rank, make, shape, _fsdp)
    with pytest.raises(TypeError, match=r"fuse: model: .*got FSDPModule"):
        fuse(_fsdp(make()))
    return trained


def _ddp_checks(rank, make, shape):
    trained = _trains_alike(rank, make, shape, DistributedDataParallel)
    with pytest.raises(TypeError, match=r"fuse: model: .*got DistributedDataParallel"):
        fuse(DistributedDataParallel(make()))
    assert any("fuse before wrapping" in row.reason for row in explain(DistributedDataParallel(make())))
    return trained


def _data_parallel_checks(rank):
    models = ((HandWritten, (5, 6)), (UNet, (3, 3, 8, 8)))
    return [check(rank, *model) for model in models for check in (_ddp_checks, _fsdp_checks)]


def test_ddp_and_fsdp2(tmp_path):
    first, second = _in_two_processes(_data_parallel_checks, tmp_path)
    assert len(first) == len(second) == 4
    for (found, expected), (elsewhere, _) in zip(first, second, strict=True):
        assert_close(found, expected, 1e-4)
        assert not torch.equal(found, elsewhere)  # each process has data of its own


def _sync_checks(rank, sizes, momentum, group):
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=momentum),
        nn.LeakyReLU(0.2, True),
        nn.ConvTranspose2d(6, 4, 4, 2, 1),
        nn.BatchNorm2d(4, 0.8, momentum, affine=False),
        nn.Tanh(),
    )
    process_group = dist.new_group([0, 1]) if group else None
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(with_statistics(copy.deepcopy(plain)), process_group)
    with_statistics(plain)
    fused = FusedSequential(*sync)
    for _ in range(2):
        joined = torch.randn(sum(sizes), 3, 5, 5) * 3 + 20
        weights = torch.randn(sum(sizes), 4, 10, 10)
        start = sum(sizes[:rank])
        mine = slice(start, start + sizes[rank])
        x, images = joined[mine].clone().requires_grad_(), joined.clone().requires_grad_()
        fused.zero_grad()
        plain.zero_grad()
        with norm_calls() as calls:
            y, expected = fused(x), plain(images)
        assert calls == ["leaky_relu", "tanh"]
        (y * weights[mine]).sum().backward()
        (expected * weights).sum().backward()
        if sizes[rank]:
            assert_close(y, expected[mine], 1e-4)
            assert_gradients({"x": x.grad}, {"x": images.grad[mine]})
        gradients = {name: p.grad for name, p in fused.named_parameters()}
        for g in gradients.values():
            dist.all_reduce(g)
        assert_gradients(gradients, {name: p.grad for name, p in plain.named_parameters()})
        for (name, a), (_, b) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
            assert_close(a, b, 1e-4, what=name)
    fused.eval()
    plain.load_state_dict(fused.state_dict(), strict=True)
    if sizes[rank]:  # alone: evaluation must not wait for the other process
        with torch.no_grad():
            assert_close(fused(x), plain.eval()(x), 1e-4)
    return y.detach(), expected.detach()


SIZES = ((4, 4), (7, 2), (5, 0))


def _all_sync_checks(rank):
    return [_sync_checks(rank, sizes, m, group=sizes == (7, 2)) for sizes in SIZES for m in (0.1, None)]


def test_sync_batch_norm_is_batch_norm_on_the_joined_batch(tmp_path):
    first, second = _in_two_processes(_all_sync_checks, tmp_path)
    assert len(first) == len(second) == 2 * len(SIZES)
    for (a, expected), (b, same) in zip(first, second, strict=True):
        assert torch.equal(expected, same)
        assert_close(torch.cat((a, b)), expected, 1e-4)
