"""Evaluation without gradients on the CPU: batch norm folded into its convolution, against the stock modules."""

import copy

import pytest
import torch
from alike import assert_close, plain_of, with_statistics
from torch import nn

from genai_fast.fusion.implementations import listener
from genai_fast.kernels.common import onednn
from genai_fast.layers import FusedSequential

pytestmark = pytest.mark.usefixtures("small_is_fused", "pinned")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def folds():
    """The convolutions into which a norm was folded."""
    made = []

    def tell(modules, decision):
        if decision.name.startswith("folded"):
            made.append(type(modules[0]).__name__)

    token = listener.set(tell)
    yield made
    listener.reset(token)


FOLDS = {
    "conv": lambda **k: nn.Conv2d(4, 6, 3, **k),
    "conv_stride": lambda **k: nn.Conv2d(4, 6, 4, 2, 1, dilation=2, **k),
    "conv_1d": lambda **k: nn.Conv1d(4, 6, 3, **k),
    "conv_3d": lambda **k: nn.Conv3d(4, 6, 2, **k),
    "transpose": lambda **k: nn.ConvTranspose2d(4, 6, 4, 2, 1, **k),
    "transpose_odd": lambda **k: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, dilation=2, **k),
    "transpose_1d": lambda **k: nn.ConvTranspose1d(4, 6, 4, 2, 1, **k),
    "transpose_3d": lambda **k: nn.ConvTranspose3d(4, 6, 2, 2, **k),
}


def _norm_for(conv, **options):
    return {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[conv.weight.dim()](6, **options)


def _images(conv, dtype=torch.float32, channels_last=False):
    x = torch.randn(3, 4, *{3: (64,), 4: (24, 23), 5: (7, 6, 5)}[conv.weight.dim()]).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(groups=2, bias=False)], ids=["bias", "groups"])
@pytest.mark.parametrize("name", FOLDS)
def test_a_folded_norm_is_the_norm(name, options, dtype, folds):
    for k, act in enumerate((nn.LeakyReLU(0.2), nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.Identity(), None,
                               nn.GELU(), nn.GELU("tanh"))):  # fmt: skip
        conv = FOLDS[name](**options)
        norm = [{}, dict(eps=0.8), dict(affine=False)][k % 3]
        fused = FusedSequential(conv, _norm_for(conv, **norm), *([] if act is None else [act])).eval()
        with_statistics(fused, k)
        plain = plain_of(fused.to(dtype)).float()
        x = _images(conv, dtype, channels_last=k % 2 == 1)
        with torch.inference_mode():
            y, stock, truth = fused(x), plain_of(fused)(x), plain(x.float())
        assert y.stride() == stock.stride()
        assert_close(y.float(), truth, {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype], what=str(act))
    assert folds == [type(conv).__name__] * 9 * onednn.serves(dtype)


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e6])
def test_a_fold_with_wild_statistics(factor, folds):
    for conv in (nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)):
        fused = with_statistics(FusedSequential(conv, nn.BatchNorm2d(6), nn.LeakyReLU(0.2)).eval())
        fused[1].running_var.mul_(factor)
        fused[1].running_mean.mul_(factor)
        with torch.no_grad():
            x = torch.randn(3, 4, 12, 12)
            assert_close(fused(x).double(), plain_of(fused).double()(x.double()), 1e-5)
    assert len(folds) == 2


def test_nan_and_infinity_pass_a_fold(folds):
    x = torch.randn(2, 4, 12, 12)
    x[0, 0, 0, 0], x[1, 0, 5, 5] = float("nan"), float("inf")
    for act in (nn.ReLU(), nn.LeakyReLU(0.0), nn.LeakyReLU(0.2), nn.Tanh()):
        fused = FusedSequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), act).eval()
        with torch.no_grad():
            y, expected = fused(x), plain_of(fused)(x)
        assert torch.equal(y.isnan(), expected.isnan()) and expected.isnan().any()
        assert torch.equal(y.isinf(), expected.isinf())
    assert len(folds) == 4


def test_a_fold_sees_every_change_of_the_weights(folds):
    fused = FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(4, 3, 12, 12)
    for change in (lambda p: p.data.copy_(p * 2 + 1), lambda p: p.data.mul_(3.0)):
        for p in (*fused.parameters(), fused[1].running_mean, fused[1].running_var):
            change(p)
            with torch.no_grad():
                assert_close(fused(x), plain_of(fused)(x))
    assert len(folds) == 12


def _no_fold(**changes):
    return {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "x": torch.randn(4, 3, 12, 12), **changes}


@pytest.mark.parametrize(
    "case",
    [
        _no_fold(x=torch.randn(4, 3, 12, 12, requires_grad=True)),
        _no_fold(),  # the parameters ask for gradients
        _no_fold(conv=nn.Conv2d(3, 4, 3, padding="same").requires_grad_(False)),
        _no_fold(conv=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect").requires_grad_(False)),
        _no_fold(conv=nn.Conv2d(3, 64, 3).requires_grad_(False), norm=nn.BatchNorm2d(64), x=torch.randn(1, 3, 3, 3)),
        _no_fold(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    ],
    ids=["input gradient", "parameter gradient", "same", "reflect", "large weight", "no statistics"],
)
def test_what_is_not_folded(case, folds, fused_calls):
    fused = FusedSequential(case["conv"], case["norm"], nn.ReLU())
    plain = plain_of(fused)
    if any(not p.requires_grad for p in fused[0].parameters()):
        fused.requires_grad_(False)
        plain.requires_grad_(False)
    fused.eval()
    plain.eval()
    assert_close(fused(case["x"]), plain(case["x"]))
    assert not folds and len(fused_calls) == 1


def test_frozen_parameters_fold_and_training_of_one_does_not(folds):
    fused = FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(4, 3, 12, 12)
    fused(x)
    assert len(folds) == 1
    fused[1].bias.requires_grad_()
    assert fused(x).requires_grad and len(folds) == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype is torch.bfloat16
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        fused(x)
    assert len(folds) == 1


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.SiLU, nn.ReLU, nn.Identity], ids=lambda a: a.__name__)
def test_nan_comes_out_of_a_folded_transpose(folds, activation):
    plain = nn.Sequential(nn.ConvTranspose2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation()).eval()
    fused = FusedSequential(*copy.deepcopy(plain)).eval()
    x = torch.randn(2, 3, 12, 12)
    x[0, 0, 5, 5] = float("nan")
    with torch.no_grad():
        found, expected = fused(x), plain(x)
    assert folds and expected.isnan().sum() == 72
    assert torch.equal(found.isnan(), expected.isnan())


def test_output_padding_beyond_the_stride_is_torchs(folds):
    conv = nn.ConvTranspose2d(3, 5, 3, dilation=2, output_padding=1)
    plain = nn.Sequential(conv, nn.BatchNorm2d(5), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert_close(FusedSequential(*plain).eval()(x), plain(x))
    assert not folds
