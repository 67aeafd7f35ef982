"""Statistics of batch norm far from zero: whatever the mean, what is constant has none of its rounding."""

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in ("reference", "cpu", "triton") if not unavailable(name, DEVICE)]
PLANES = torch.linspace(1000, 1001, 8 * 4 * 32 * 32).view(8, 4, 32, 32)
X = {
    "constant": torch.full((8, 4, 64, 64), 1000.123),
    "negative": torch.full((3, 4, 33, 31), -98765.43),
    "ramp": PLANES,
    "first_of_zeros": torch.cat([torch.zeros(1, 4, 32, 32), PLANES[1:]]),
    "many_rows": torch.full((70_000, 3), 1234.567),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", X)
def test_large_means(name, last, backend):
    x = X[name].to(DEVICE)
    if x.dim() == 4 and last:
        x = x.contiguous(memory_format=torch.channels_last)
    axes = [k for k in range(x.dim()) if k != 1]
    var, mean = torch.var_mean(x.double(), axes, correction=0, keepdim=True)
    running = [torch.zeros(x.size(1), device=DEVICE), torch.ones(x.size(1), device=DEVICE)]
    with use_backend(backend):
        y = ops.batch_norm_act(x, None, None, *running, training=True, momentum=1.0, activation="none")
    torch.testing.assert_close(y.double(), (x.double() - mean) / (var + 1e-5).sqrt(), atol=2e-4, rtol=0)
    torch.testing.assert_close(running[0], mean.flatten().float(), atol=0, rtol=1e-7)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])  # that has no such kernel
def test_a_convolutions_large_constant(backend):
    """Its statistics are taken by tiles while it is computed."""
    x, weight = torch.ones(2, 16, 16, 16, device=DEVICE), torch.zeros(16, 24, 4, 4, device=DEVICE)
    bias = torch.full((24,), 1000.123, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    with use_backend(backend):
        y = ops.conv_transpose2d_batch_norm_act(
            x, weight, bias, running_mean=torch.zeros(24, device=DEVICE), running_var=torch.ones(24, device=DEVICE),
            stride=2, padding=1, activation="none",
        )  # fmt: skip
    assert not y.any()
