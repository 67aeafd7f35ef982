"""Upsampling to twice the size and the 3 x 3 convolution after it, as one convolution of the smaller image."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_close, calls_of, with_statistics
from torch import nn

from genai_fast import autotune, explain, fuse, unfuse

pytestmark = pytest.mark.usefixtures("small_is_fused")

C = 8


@pytest.fixture(params=["upsample_conv2d", "upsampled first"])
def chosen(request, monkeypatch):
    """Takes that implementation where it serves, and measures nothing."""
    monkeypatch.setattr(autotune, "choose", _taking(request.param))
    return request.param


def _taking(name):
    def choose(family, shape, device, candidates):
        names, default = candidates()
        return autotune.Choice(name if name in names else default, {})

    return choose


def conv(inputs=C, outputs=C, **settings):
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **settings})


class Base(nn.Module):
    def __init__(self, upsample=None):
        super().__init__()
        self.up = upsample or nn.Upsample(scale_factor=2)
        self.conv, self.conv2, self.bn, self.act = conv(), conv(), nn.BatchNorm2d(C), nn.LeakyReLU(0.2, inplace=True)


class Statements(Base):
    def forward(self, x):
        x = self.up(x)
        x = self.conv(x)
        x = self.bn(x)
        return self.act(x)


class ByFunction(Base):
    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        return F.relu(self.bn(self.conv(x)))


class ESRGAN(Base):
    def forward(self, x):
        out = self.act(self.conv(F.interpolate(x, scale_factor=2, mode="nearest")))
        return self.act(self.conv2(F.interpolate(out, scale_factor=2, mode="nearest")))


class Residual(Base):
    def forward(self, x):
        h = self.bn(self.conv(F.interpolate(x, scale_factor=2.0)))
        return h + F.interpolate(x, scale_factor=2.0)


class BySize(Base):
    def forward(self, x):
        return torch.tanh(self.bn(self.conv(F.interpolate(x, size=(12, 10)))))


def sequential(*rest, upsample=None):
    return lambda: nn.Sequential(upsample or nn.Upsample(scale_factor=2), conv(), *rest)


MODELS = {
    "gan": lambda: nn.Sequential(
        nn.BatchNorm2d(C), nn.Upsample(scale_factor=2), conv(), nn.BatchNorm2d(C, 0.8), nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=2), conv(C, 3), nn.Tanh(),
    ),
    "sizes": sequential(nn.InstanceNorm2d(C), nn.ReLU(True), upsample=nn.Upsample((12, 10))),
    "old_name": sequential(nn.PReLU(), upsample=nn.UpsamplingNearest2d(scale_factor=2)),
    "pairs": sequential(nn.ReLU(), nn.Dropout(0.0), upsample=nn.Upsample(scale_factor=(2, 2), mode="nearest")),
    "bare": sequential(),
    **{cls.__name__: cls for cls in (Statements, ByFunction, ESRGAN, Residual, BySize)},
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_as_people_write_it(make, layout, chosen):
    torch.manual_seed(0)
    plain = with_statistics(make())
    fused = fuse(copy.deepcopy(plain))
    with calls_of("upsample_conv2d") as made:
        assert_alike(fused, plain, torch.randn(2, C, 6, 5).contiguous(memory_format=layout), steps=1)
    assert bool(made) == (chosen == "upsample_conv2d")


NEAR_MISSES = {
    "three_times": sequential(upsample=nn.Upsample(scale_factor=3)),
    "bilinear": sequential(upsample=nn.Upsample(scale_factor=2, mode="bilinear")),
    "another_size": sequential(upsample=nn.Upsample(size=(11, 10))),
    "kernel": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 5, padding=2), nn.BatchNorm2d(C)),
    "stride": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(stride=2), nn.BatchNorm2d(C)),
    "reflected": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(padding_mode="reflect"), nn.BatchNorm2d(C)),
    "grouped": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(groups=2), nn.BatchNorm2d(C)),
    "not_next": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), conv(padding=0)),
    "used_twice": lambda: UsedTwice(),
    "hooked": lambda: hooked(),
}


class UsedTwice(Base):
    def forward(self, x):
        x = self.up(x)
        return self.conv(x) + x


def hooked():
    model = nn.Sequential(nn.Upsample(scale_factor=2), conv(), nn.BatchNorm2d(C))
    model[0].register_forward_hook(lambda m, args, y: y + 1)
    return model


@pytest.mark.parametrize("make", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_is_left_alone(make, monkeypatch):
    monkeypatch.setattr(autotune, "choose", _taking("upsample_conv2d"))
    torch.manual_seed(0)
    plain = make()
    fused = fuse(copy.deepcopy(plain))
    with calls_of("upsample_conv2d") as made:
        assert_alike(fused, plain, torch.randn(2, C, 6, 5), steps=1)
    assert not made


@pytest.mark.parametrize("chosen", ["upsample_conv2d"], indirect=True)
def test_under_autocast_and_twice_derived(chosen):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Upsample(scale_factor=2), conv(), nn.Tanh(), nn.Upsample(scale_factor=2), conv(C, 1))
    fused = fuse(copy.deepcopy(plain))
    x, found = torch.randn(2, C, 6, 5), []
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), plain(x)
    assert y.dtype is expected.dtype and y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    for model in (fused, plain):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        slope.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        if b is not None:
            assert_close(a, b, 1e-4)


def test_the_choice_is_measured_and_explained(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Upsample(scale_factor=2), conv(), nn.BatchNorm2d(C), nn.ReLU())
    measured = []
    monkeypatch.setattr(autotune, "_clock", lambda device, call: measured.append(call()) or 1e-3)
    (row,) = explain(model, torch.randn(2, C, 6, 5))
    assert row.path == "0+1+2+3" and measured
    (row,) = explain(model)
    assert "upsample_conv2d" in row.becomes and "batch_norm_act (ReLU)" in row.becomes
    assert type(unfuse(fuse(model))) is nn.Sequential
    (row,) = explain(nn.Sequential(nn.Upsample(scale_factor=2), nn.ReLU()))
    assert row.path == "0" and "3 x 3 convolution" in row.reason
