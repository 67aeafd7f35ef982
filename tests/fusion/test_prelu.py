"""PReLU after a batch norm in the norm's call, and by itself in a call of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_close, calls_of, step, with_statistics
from torch import nn

from genai_fast import explain, fuse, unfuse

pytestmark = pytest.mark.usefixtures("small_is_fused")

C = 8
SHAPES = {2: (16, C), 3: (4, C, 12), 4: (4, C, 6, 7), 5: (2, C, 3, 4, 5)}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def pair(*modules):
    torch.manual_seed(0)
    plain = with_statistics(nn.Sequential(*modules))
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(-0.4, 0.8)
    return fuse(copy.deepcopy(plain)), plain


def laid_out(layout, dims):
    x = torch.randn(SHAPES[dims])
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x if layout == "contiguous" else torch.cat((x, x), 1)[:, ::2]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("slopes", [1, C])
@pytest.mark.parametrize("dims", SHAPES)
def test_after_a_batch_norm_and_alone(dims, slopes, layout):
    x = laid_out(layout, dims)
    fused, plain = pair(NORMS[dims](C), nn.PReLU(slopes))
    with calls_of("batch_norm_act") as made:
        assert_alike(fused, plain, x, steps=2)
    assert made and all(args[8] == "prelu" for args in made)
    fused, plain = pair(nn.PReLU(slopes))
    with calls_of("bias_act") as made:
        assert_alike(fused, plain, x, steps=2)
    assert len(made) == (dims != 3 or layout != "channels_last") * 4


class Block(nn.Module):
    """As SRGAN's residual blocks are written."""

    def __init__(self, slopes=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.prelu = nn.PReLU(slopes)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        residual = self.conv1(x)
        residual = self.bn1(residual)
        residual = self.prelu(residual)
        residual = self.conv2(residual)
        residual = self.bn2(residual)
        return x + residual


class Nested(Block):
    def forward(self, x):
        return x + self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))


class InASequential(Block):
    def __init__(self, slopes=1):
        super().__init__(slopes)
        self.block = nn.Sequential(self.conv1, self.bn1, self.prelu, self.conv2, self.bn2)

    def forward(self, x):
        return torch.add(x, self.block(x))


class AfterTheSum(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = out + x
        return self.prelu(out)


class Branched(Block):
    def forward(self, x):
        h = self.conv1(x)
        if self.training:
            h = h + 1
            h = self.bn1(h)
        else:
            h = self.bn2(h)
        return self.prelu(h)


WRITTEN = (Block, Nested, InASequential, AfterTheSum, Branched)


@pytest.mark.parametrize("slopes", [1, C])
@pytest.mark.parametrize("cls", WRITTEN, ids=lambda cls: cls.__name__)
def test_as_people_write_it(cls, slopes):
    torch.manual_seed(0)
    plain = with_statistics(cls(slopes))
    fused = fuse(copy.deepcopy(plain))
    with calls_of("batch_norm_act") as made:
        assert_alike(fused, plain, torch.randn(4, C, 6, 6), steps=2)
    assert "prelu" in [args[8] for args in made]


class Shared(Block):
    """What is normed is used again."""

    def forward(self, x):
        h = self.bn1(self.conv1(x))
        return self.prelu(h) + h


class ByFunction(Block):
    def forward(self, x):
        return F.prelu(self.bn1(self.conv1(x)), self.prelu.weight)


def _hooked(module):
    module.prelu.register_forward_hook(lambda m, args, y: 2 * y)
    return module


class Own(nn.PReLU):
    def forward(self, x):
        return super().forward(x) + 1


def _own(module):
    module.prelu = Own()
    return module


NEAR_MISSES = {
    "shared": Shared, "function": ByFunction, "hook": lambda: _hooked(Block()), "subclass": lambda: _own(Block()),
}  # fmt: skip


@pytest.mark.parametrize("make", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_is_left_alone(make):
    torch.manual_seed(0)
    plain = make()
    fused = fuse(copy.deepcopy(plain))
    with calls_of("batch_norm_act") as made:
        assert_alike(fused, plain, torch.randn(4, C, 6, 6), steps=2)
    assert "prelu" not in [args[8] for args in made]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.PReLU(3), (4, C, 5)), (nn.PReLU().double(), (4, C, 5)), (nn.PReLU(3), (4, 1))],
    ids=["channels", "dtype", "one_channel"],
)
@pytest.mark.parametrize("normed", [False, True])
def test_what_pytorch_refuses_is_refused_in_its_words(module, shape, normed):
    plain = nn.Sequential(*[nn.BatchNorm1d(shape[1])] * normed, module)
    said = []
    for model in (plain, fuse(copy.deepcopy(plain))):
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(shape))
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
def test_under_autocast_dtypes_are_pytorchs(normed, given):
    fused, plain = pair(*[nn.BatchNorm2d(C)] * normed, nn.PReLU())
    x = torch.randn(SHAPES[4]).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(x), plain(x)
        for y in (found, expected):
            y.float().square().sum().backward()
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype is q.grad.dtype
        torch.testing.assert_close(p.grad, q.grad, rtol=5e-2, atol=5e-2 * float(q.grad.abs().max()))


def test_special_values_and_frozen_slopes():
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0], [float("inf"), -float("inf"), float("nan"), -1e-30]]).repeat(2, 2)
    fused, plain = pair(nn.PReLU(C))
    for model in (fused, plain):
        model[0].weight.requires_grad_(False)
    (found, found_gradients), (expected, expected_gradients) = step(fused, x), step(plain, x)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("normed", [False, True])
def test_second_derivatives_of_a_critic(normed):
    x, penalties = torch.randn(SHAPES[4]), []
    for model in pair(*[nn.BatchNorm2d(C)] * normed, nn.PReLU(C), nn.Conv2d(C, 1, 3), nn.PReLU()):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        slope.square().sum().backward()
        penalties.append([p.grad for p in model.parameters() if p.grad is not None])
    for found, expected in zip(*penalties, strict=True):
        assert_close(found, expected, 1e-4)


def test_what_explain_says_and_unfuse_undoes():
    model = nn.Sequential(nn.Conv2d(3, C, 9, padding=4), nn.PReLU(), nn.BatchNorm2d(C), nn.PReLU(C), nn.PixelShuffle(2))
    rows = {row.path: row.becomes for row in explain(model)}
    assert rows["1"] == "bias_act (PReLU)" and rows["2+3"].startswith("batch_norm_act (PReLU)")
    rows = {row.path: row for row in explain(model, torch.randn(2, 3, 8, 8))}
    assert rows["1"].becomes == "bias_act" and rows["2+3"].becomes == "batch_norm_act"
    assert type(unfuse(fuse(model))) is nn.Sequential
