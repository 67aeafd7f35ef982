"""Kernels of another project, Liger's, on the emulated GPU, against plain PyTorch: they prove the emulator.

test_kernels.py runs this file, in a process in which Triton compiles, where liger-kernel is installed.
"""

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.ops import (
    cross_entropy,
    fused_add_rms_norm,
    fused_linear_cross_entropy,
    geglu,
    group_norm,
    jsd,
    kl_div,
    layer_norm,
    relu_squared,
    rms_norm,
    rope,
    softmax,
    sparsemax,
    swiglu,
    tvd,
)

from bench import liger
from genai_fast.kernels.common.spec import Tensors
from genai_fast.registry import OPS
from genai_fast.testing import emulated_gpu

ROWS, COLUMNS, CLASSES = 13, 96, 130
EPS = 1e-6


def _rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _jsd(p, q):
    middle = (0.5 * (p.exp() + q.exp())).log()
    both = (F.kl_div(middle, x, log_target=True, reduction="sum") for x in (p, q))
    return 0.5 * sum(both) / len(p)


def _turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _sparsemax(x):
    ordered, k = x.sort(-1, descending=True).values, torch.arange(1, x.shape[-1] + 1)
    sums = ordered.cumsum(-1)
    support = (1 + k * ordered > sums).sum(-1, keepdim=True)
    return (x - (sums.gather(-1, support - 1) - 1) / support).clamp(min=0)


def _draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, Y, W, B = _draw(ROWS, COLUMNS), _draw(ROWS, COLUMNS).flip(0), _draw(COLUMNS), _draw(COLUMNS).flip(0)
LOG, P, Q = _draw(ROWS, CLASSES).log_softmax(-1), _draw(ROWS, CLASSES).softmax(-1), _draw(CLASSES, ROWS).softmax(0).t()
Q = Q.contiguous()
TARGET = torch.arange(ROWS) * 7 % CLASSES
ANGLE = _draw(1, 9, 16)
COS, SIN = torch.cat([ANGLE.cos()] * 2, -1), torch.cat([ANGLE.sin()] * 2, -1)

# name -> Liger's, plain PyTorch, inputs. Liger's write over some of their inputs, hence the clones.
CASES = {
    "rms_norm": (lambda x, w: rms_norm.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False), _rms, (X, W)),
    "fused_add_rms_norm": (
        lambda x, y, w: fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply(x, y, w, EPS, 0.0, "llama", False),
        lambda x, y, w: (_rms(x + y, w), x + y), (X, Y, W)),
    "layer_norm": (lambda x, w, b: layer_norm.LigerLayerNormFunction.apply(x, w, b, EPS),
                   lambda x, w, b: F.layer_norm(x, (COLUMNS,), w, b, EPS), (X, W, B)),
    "group_norm": (lambda x, w, b: group_norm.LigerGroupNormFunction.apply(x, w, b, 12, 4, EPS),
                   lambda x, w, b: F.group_norm(x, 4, w, b, EPS), (_draw(3, 12, 40), _draw(12), _draw(12).flip(0))),
    "swiglu": (lambda a, b: swiglu.LigerSiLUMulFunction.apply(a.clone(), b.clone()),
               lambda a, b: F.silu(a) * b, (X, Y)),
    "geglu": (lambda a, b: geglu.LigerGELUMulFunction.apply(a.clone(), b.clone()),
              lambda a, b: F.gelu(a, approximate="tanh") * b, (X, Y)),
    "relu_squared": (relu_squared.LigerReLUSquaredFunction.apply, lambda x: F.relu(x).square(), (X,)),
    "softmax": (softmax.LigerSoftmaxFunction.apply, lambda x: x.softmax(-1), (X,)),
    "sparsemax": (lambda x: sparsemax.LigerSparsemaxFunction.apply(x, -1), _sparsemax, (X,)),
    "kl_div": (lambda p: kl_div.LigerKLDivLossFunction.apply(p, Q, "batchmean", False, 1e-10),
               lambda p: F.kl_div(p, Q, reduction="batchmean"), (LOG,)),
    "jsd": (lambda p: jsd.LigerJSDFunction.apply(p, Q.log(), None, 0.5, -100), lambda p: _jsd(p, Q.log()), (LOG,)),
    "tvd": (lambda p: tvd.LigerTVDLossFunction.apply(p, Q, None, "batchmean", -100),
            lambda p: 0.5 * (p - Q).abs().sum() / ROWS, (P,)),
    "rope": (lambda q, k: rope.LigerRopeFunction.apply(q.clone(), k.clone(), COS, SIN),
             lambda q, k: tuple(x * COS[:, None] + _turned(x) * SIN[:, None] for x in (q, k)),
             (_draw(2, 4, 9, 32), _draw(2, 2, 9, 32))),
    "cross_entropy": (
        lambda x: cross_entropy.LigerCrossEntropyFunction.apply(
            x.clone(), TARGET, None, -100, 0.0, 0.0, "mean", None, False)[0],
        lambda x: F.cross_entropy(x, TARGET), (_draw(ROWS, CLASSES),)),
    "fused_linear_cross_entropy": (
        lambda x, w: fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction.apply(x, w, TARGET)[0],
        lambda x, w: F.cross_entropy(x @ w.t(), TARGET), (X, _draw(CLASSES, COLUMNS) / 10)),
}  # fmt: skip


def _outputs_and_gradients(function, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    found = function(*inputs)
    outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y is not None and y.requires_grad]
    upstream = [torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_pytorch_does(name, arch):
    function, plain, inputs = CASES[name]
    with emulated_gpu(arch) as gpu:
        found = _outputs_and_gradients(function, inputs)
    assert gpu.launches and not gpu.warnings
    expected = _outputs_and_gradients(plain, [x.double() if x.is_floating_point() else x for x in inputs])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", liger.CALLS)
def test_what_is_compared_computes_the_same(name):
    op, inputs = OPS[name], OPS[name].limits.inputs(Tensors(torch.float32))
    expected = op.reference(**inputs)
    with emulated_gpu() as gpu:
        found = liger.call(name, inputs, gpu.device.multiprocessors)  # which writes over some of the inputs
        grids = {r.kernel: r.programs for r in gpu.records}
    found = [torch.cat(found, 1)] if name == "rotary" else found
    for got, want in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert "norm" not in name or gpu.device.multiprocessors in grids.values()
