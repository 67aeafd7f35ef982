"""A residual added to a norm's result: with the activation after it one call, in methods as people write them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from torch import nn
from torch.overrides import TorchFunctionMode

from genai_fast import explain, fuse, ops

pytestmark = pytest.mark.usefixtures("small_is_fused")

C = 8


@pytest.fixture
def sums(monkeypatch):
    """The activations of norms that were called with a residual."""
    made = []
    for name, at, place in (("batch_norm_act", 8, 10), ("group_norm_act", 5, 7)):
        op = getattr(ops, name)

        def call(*args, op=op, at=at, place=place, **named):
            if args[place] is not None:
                made.append(args[at])
            return op(*args, **named)

        monkeypatch.setattr(ops, name, call)
    return made


def conv3():
    return nn.Conv2d(C, C, 3, padding=1, bias=False)


class Base(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.conv2, self.bn1, self.bn2 = conv3(), conv3(), norm(C), norm(C)
        self.relu, self.downsample, self.scale = nn.ReLU(inplace=True), None, nn.Parameter(torch.ones(C, 1, 1))
        self.shortcut = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), norm(C))
        self.block = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(C, C, 3), norm(C), nn.ReLU(True), conv3(), norm(C))


FUSED = {}  # activations of the norms that are called with a residual


def fused_as(*activations):
    def enter(cls):
        FUSED[cls] = [*activations]
        return cls

    return enter


@fused_as("relu")
class Torchvision(Base):
    """BasicBlock; `Downsampled` is the one with a shortcut."""

    def forward(self, x):
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


@fused_as("relu")
class Downsampled(Torchvision):
    def __init__(self):
        super().__init__()
        self.downsample = self.shortcut


@fused_as("relu")
class Nested(Base):
    """pytorch-cifar's."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


@fused_as("relu")
class Expression(Base):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + x)


@fused_as("relu", "relu")
class TwoSums(Base):
    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(F.relu(self.bn1(x) + x))))


@fused_as("none")
class CycleGAN(Base):
    def forward(self, x):
        out = x + self.block(x)
        return out


class _Block(nn.Sequential):
    """As torchvision's, which only has a constructor of its own."""

    def __init__(self):
        super().__init__(conv3(), nn.BatchNorm2d(C), nn.ReLU(), nn.Sequential(conv3(), nn.BatchNorm2d(C)))


class _Doubling(_Block):
    def forward(self, x):
        return 2 * super().forward(x)


@fused_as("none")
class Subclass(Base):
    def __init__(self):
        super().__init__()
        self.f = _Block()

    def forward(self, x):
        x = x + self.f(x)
        x = self.conv1(x)
        return self.relu(x)


@fused_as()
class OwnForward(Subclass):
    def __init__(self):
        super().__init__()
        self.f = _Doubling()


@fused_as("none")
class SRGAN(Base):
    def __init__(self):
        super().__init__()
        self.prelu = nn.PReLU()

    def forward(self, x):
        out = self.prelu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn2(out)
        return out + x


@fused_as("relu")
class Method(Base):
    def forward(self, x):
        residual = self.shortcut(x)
        h = self.conv1(x)
        h = self.bn1(h)
        return (h + residual).relu()


@fused_as("sigmoid", "tanh")
class OtherActivations(Base):
    def forward(self, x):
        x = torch.sigmoid(self.bn1(self.conv1(x)) + x)
        return (self.bn2(self.conv2(x)) + x).tanh()


@fused_as("leaky_relu")
class InPlace(Base):
    def forward(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        out = out + x
        return F.leaky_relu(out, 0.2, inplace=True)


@fused_as("relu")
class Computed(Base):
    """The residual is an expression."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out += F.relu(self.conv2(x)) * 0.5
        return F.relu(out)


@fused_as("relu")
class Conditional(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        residual = self.downsample(x) if self.downsample is not None else x
        out = self.relu(out + residual)
        return out


@fused_as("silu", "relu")
class After(Base):
    """A residual after the activation: nothing but the norm's input is kept."""

    def forward(self, x):
        x = x + F.silu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(x))
        h = F.relu(h)
        return h + self.shortcut(x)


@fused_as("relu", "relu")
class AfterAndMore(Base):
    """What comes after such a sum is a call of its own."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(norm)
        self.block.append(nn.ReLU())

    def forward(self, x):
        x = F.relu(x + self.block(x))
        return torch.tanh(torch.relu(self.bn1(self.conv1(x))) + x)


# --- and what is left alone


@fused_as()
class Broadcast(Base):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)).mean((2, 3), keepdim=True))


@fused_as()
class Number(Base):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + 1)


@fused_as()
class Parameter(Base):
    """An attribute may be a property, which may do anything."""

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + self.scale)


@fused_as()
class UsedAgain(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        total = F.relu(out + x)
        return total * out


@fused_as()
class Looks(Base):
    """What is in between reads the result."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        if out.sum() > 0:
            x = self.conv2(x)
        out += x
        return F.relu(out)


@fused_as()
class Calls(Base):
    def change(self, x):
        self.bn1.momentum = 1.0
        return x

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + self.change(x))


@fused_as()
class Difference(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out -= x
        return F.relu(out)


@fused_as()
class Handled(Base):
    def forward(self, x):
        try:
            out = self.bn1(self.conv1(x))
            out += x
        finally:
            pass
        return F.relu(out)


class Changed(Base):
    """What computes the residual changes the norm's input, which the norm has read by then."""

    def forward(self, x):
        x = x * 1.0
        return F.relu(self.bn1(x) + self.relu(x))


@fused_as()
class Smooth(Base):
    """PyTorch keeps the sum for SiLU's backward, and the residual may be changed afterwards."""

    def forward(self, x):
        identity = x * 1.0
        y = F.silu(self.bn1(self.conv1(x)) + identity)
        identity.mul_(2.0)
        return y + identity


@fused_as("relu")
class ChangedAfterwards(Base):
    def forward(self, x):
        identity = x * 1.0
        y = F.relu(self.bn1(self.conv1(x)) + identity)
        identity.mul_(2.0)
        return y + identity


def pair(cls, *given):
    torch.manual_seed(0)
    plain = cls(*given)
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(0.0, 0.5)
    return fuse(copy.deepcopy(plain)), plain


def assert_alike(fused, plain, x, tolerance=1e-4):
    results = []
    for model in (fused, plain):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        used = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": leaf.grad, **used, **dict(model.named_buffers())})
        model.zero_grad()
    assert results[0].keys() == results[1].keys() and results[0]["y"].stride() == results[1]["y"].stride()
    for name, found in results[0].items():
        expected = results[1][name]  # a bias before a norm has a gradient of rounding errors
        assert_close(found, expected, tolerance, max(expected.detach().abs().max().item(), 0.1), name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("cls", FUSED, ids=lambda c: c.__name__)
def test_in_training(cls, layout, sums):
    fused, plain = pair(cls)
    x = torch.randn(4, C, 9, 7).to(memory_format=layout)
    assert_alike(fused, plain, x)
    assert sums == FUSED[cls]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("cls", FUSED, ids=lambda c: c.__name__)
def test_in_evaluation(cls, gradients, sums):
    fused, plain = pair(cls)
    fused.eval(), plain.eval()
    x = torch.randn(4, C, 9, 7)
    with torch.set_grad_enabled(gradients):
        assert_close(fused(x), plain(x), 1e-4)
    assert len(sums) >= len(FUSED[cls])  # without gradients SiLU's may be kept too


@torch.no_grad()
def test_what_changes_the_norms_input(sums):
    fused, plain = pair(Changed)
    x = torch.randn(4, C, 9, 7)
    assert_close(fused(x), plain(x))
    assert not sums


NORMS = {
    "group": lambda c: nn.GroupNorm(4, c),
    "instance": nn.InstanceNorm2d,
    "affine": lambda c: nn.InstanceNorm2d(c, affine=True),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "cls", [Torchvision, Nested, Expression, CycleGAN, InPlace, Smooth, After, AfterAndMore], ids=lambda c: c.__name__
)
def test_group_and_instance_norms(cls, norm, sums):
    fused, plain = pair(cls, NORMS[norm])
    assert_alike(fused, plain, torch.randn(4, C, 9, 7))
    assert sums == FUSED[cls]


@pytest.mark.parametrize("cls", [Torchvision, Expression, CycleGAN], ids=lambda c: c.__name__)
def test_under_autocast(cls):
    fused, plain = pair(cls)
    x = torch.randn(4, C, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(x), plain(x)
    assert_close(found, expected, 3e-2)


def test_second_derivatives():
    grads = []
    for model in pair(Nested):
        x = torch.randn(4, C, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().sum()
        grads.append(torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True))
    for found, expected in zip(*grads, strict=True):
        assert (found is None) is (expected is None)
        if found is not None:
            assert_close(found, expected, 1e-3)


@pytest.mark.parametrize("name", ["bn2", "relu", "conv2", "downsample"])
def test_a_hook_sees_what_it_sees(name):
    seen = []
    for model in pair(Downsampled):
        log = []

        def look(module, args, y, log=log):
            log.append((args[0].sum().item(), y.sum().item()))

        getattr(model, name).register_forward_hook(look)
        model(torch.ones(2, C, 5, 5))
        seen.append(log)
    torch.testing.assert_close(torch.tensor(seen[0]), torch.tensor(seen[1]), rtol=1e-3, atol=1e-3)


class Recording(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", [Downsampled, Nested, CycleGAN], ids=lambda c: c.__name__)
def test_a_mode_sees_the_order_of_the_calls(cls):
    seen = []
    for model in pair(cls):
        with Recording() as mode:
            model(torch.ones(2, C, 5, 5))
        seen.append(mode.names)
    assert seen[0] == seen[1]


def test_a_graph_without_breaks():
    fused, plain = pair(Downsampled)
    x = torch.randn(2, C, 5, 5)
    torch._dynamo.reset()
    assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), plain(x), 1e-4)


def test_it_is_explained():
    model = Downsampled()
    rows = {row.path: row.becomes for row in explain(model)}
    assert rows["conv1+bn1+relu"].startswith("batch_norm_act (ReLU)")
    assert any(becomes.startswith("batch_norm_act (residual, ReLU)") for becomes in rows.values())
    observed = explain(model, torch.randn(2, C, 9, 9))
    assert any(row.found == "BatchNorm2d + Residual + ReLU" and row.becomes == "batch_norm_act" for row in observed)


@pytest.mark.parametrize("other", [lambda x: x.double(), lambda x: x[:, :1], lambda x: x.transpose(2, 3), lambda x: 2])
def test_residuals_that_do_not_match_are_added_as_they_were(other):
    class Given(Base):
        def forward(self, x, residual):
            return F.relu(self.bn1(self.conv1(x)) + residual)

    fused, plain = pair(Given)
    x = torch.randn(2, C, 6, 6)
    found, expected = fused(x, other(x)), plain(x, other(x))
    assert found.dtype is expected.dtype and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
