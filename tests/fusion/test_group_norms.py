"""Group and instance norms with the activation after them run as one, as PyTorch's modules do one after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import genai_fast
from genai_fast import explain, fuse, layers
from genai_fast.fusion import thresholds

CHANNELS = 32
SHAPES = {2: (4, CHANNELS), 3: (4, CHANNELS, 40), 4: (4, CHANNELS, 12, 10), 5: (2, CHANNELS, 4, 5, 6)}
NORMS = {
    "group": lambda dims: nn.GroupNorm(8, CHANNELS),
    "one_group": lambda dims: nn.GroupNorm(1, CHANNELS, eps=0.1),
    "plain_group": lambda dims: nn.GroupNorm(4, CHANNELS, affine=False),
    "instance": lambda dims: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 3](CHANNELS),
    "affine": lambda dims: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 3](CHANNELS, affine=True),
}


@pytest.fixture(autouse=True)
def any_size():
    with thresholds.ignored():
        yield


def pair(*modules):
    torch.manual_seed(0)
    plain = nn.Sequential(*modules)
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_()
    return fuse(copy.deepcopy(plain)), plain


def served(fused, x):
    return [row.becomes for row in explain(fused, x)]


def assert_alike(fused, plain, x):
    results = []
    for model in (fused, plain):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in model.parameters())))
        model.zero_grad()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert results[0][0].stride() == results[1][0].stride() and results[0][0].dtype is results[1][0].dtype
    assert results[0][1].stride() == results[1][1].stride()


def laid_out(layout, dims):
    x = torch.randn(SHAPES[dims])
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x if layout == "contiguous" else torch.cat((x, x), 1)[:, ::2]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_and_its_activation_are_one_call(norm, dims, layout):
    if dims == 2 and norm in ("instance", "affine"):
        pytest.skip("instance norm is of positions")
    fused, plain = pair(NORMS[norm](dims), nn.SiLU())
    x = laid_out(layout, dims)
    assert_alike(fused, plain, x)
    assert served(fused, x) == ["group_norm_act"]


def _hooked(norm):
    norm.register_forward_hook(lambda module, args, output: 2 * output)
    return norm


class _Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def _patched(norm):
    norm.forward = lambda x: 2 * F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return norm


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
        lambda: _hooked(nn.GroupNorm(8, CHANNELS)),
        lambda: _Doubled(8, CHANNELS),
        lambda: _patched(nn.GroupNorm(8, CHANNELS)),
        lambda: nn.utils.parametrizations.weight_norm(nn.GroupNorm(8, CHANNELS), dim=0),
    ],
    ids=["running_statistics", "hook", "subclass", "patched", "parametrized"],
)
def test_what_only_a_call_honours_is_left_alone(norm):
    torch.manual_seed(0)
    plain = nn.Sequential(norm(), nn.ReLU())
    fused = fuse(nn.Sequential(*plain))  # the same children
    x = torch.randn(SHAPES[4])
    assert "group_norm_act" not in served(fused, x)
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_running_statistics_move_as_they_do(mode):
    fused, plain = pair(nn.InstanceNorm2d(CHANNELS, track_running_stats=True), nn.ReLU())
    getattr(fused, mode)(), getattr(plain, mode)()
    x = torch.randn(SHAPES[4])
    torch.testing.assert_close(fused(x), plain(x))
    for ours, expected in zip(fused.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.GroupNorm(8, 8), (1, 8, 1)), (nn.GroupNorm(8, 8), (1, 8)), (nn.GroupNorm(4, 8), (2, 6, 3)),
        (nn.InstanceNorm2d(8), (2, 8, 1, 1)), (nn.InstanceNorm1d(8, affine=True), (2, 6, 4)),
        (nn.GroupNorm(4, 8, dtype=torch.bfloat16), (2, 8, 3)), (nn.GroupNorm(4, 8), (8,)),
    ],
)  # fmt: skip
def test_what_pytorch_refuses_is_refused_in_its_words(module, shape):
    plain = nn.Sequential(module, nn.ReLU())
    said = []
    for model in (plain, fuse(copy.deepcopy(plain))):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            model(torch.randn(shape))
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.InstanceNorm2d(8), (8, 5, 5)), (nn.InstanceNorm1d(8), (8, 5)), (nn.GroupNorm(4, 8), (0, 8, 3)),
        (nn.GroupNorm(4, 8, eps=0.0), (2, 8, 3)), (nn.GroupNorm(4, 8, eps=-1.0), (2, 8, 3)),
        (nn.InstanceNorm2d(4), (2, 8, 5, 5)),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match")
def test_odd_inputs_give_what_the_modules_give(module, shape):
    fused, plain = pair(module, nn.ReLU())
    x = torch.randn(shape)
    torch.testing.assert_close(fused(x), plain(x), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8, eps=0.0, affine=True), nn.GroupNorm(4, 8, eps=0.0)])
def test_planes_of_one_value_with_eps_0(norm):
    fused, plain = pair(norm, nn.ReLU())
    x = torch.zeros(2, 8, 64, 64)
    torch.testing.assert_close(fused(x), plain(x), equal_nan=True)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_under_autocast_dtypes_are_pytorchs(norm, given):
    fused, plain = pair(NORMS[norm](4), nn.SiLU())
    x = torch.randn(SHAPES[4]).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(x), plain(x)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


class Written(nn.Module):
    """As a residual block of a diffusion model is written."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, CHANNELS), nn.InstanceNorm2d(CHANNELS)
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h)
        h = torch.relu(h)
        return x + self.conv2(h)


def test_in_a_method_as_it_is_written():
    torch.manual_seed(0)
    plain = Written()
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(SHAPES[4])
    assert_alike(fused, plain, x)
    rows = {row.path: row.becomes for row in explain(fused, x)}
    assert sum(becomes == "group_norm_act" for becomes in rows.values()) == 2


def test_second_derivatives_of_a_critic():
    fused, plain = pair(nn.Conv2d(3, CHANNELS, 3), nn.InstanceNorm2d(CHANNELS, affine=True), nn.LeakyReLU(0.2))
    grads = []
    for model in (fused, plain):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grads.append(
            torch.autograd.grad((gradient.flatten(1).norm(dim=1) - 1).square().sum(), list(model.parameters()))
        )
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_layers_take_a_residual_and_a_modulation(residual, modulated):
    torch.manual_seed(0)
    x, more = torch.randn(2, *SHAPES[4])
    scale, shift = torch.randn(2, 4, CHANNELS)
    given = dict(residual=more) if residual else {}
    given |= dict(scale=scale, shift=shift) if modulated else {}
    for layer, norm in (
        (layers.GroupNormAct(8, CHANNELS, activation="silu"), nn.GroupNorm(8, CHANNELS)),
        (layers.InstanceNormAct(CHANNELS, affine=True, activation="silu"), nn.InstanceNorm2d(CHANNELS, affine=True)),
    ):
        norm.load_state_dict(layer.state_dict())
        expected = norm(x)
        if modulated:
            expected = expected * (1 + scale[..., None, None]) + shift[..., None, None]
        expected = F.silu(expected + more if residual else expected)
        torch.testing.assert_close(layer(x, **given), expected, rtol=1e-4, atol=1e-5)


def test_layers_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"activation.*'silu'.*got 'swish'"):
        layers.GroupNormAct(8, CHANNELS, activation="swish")
    with pytest.raises(ValueError, match=r"num_groups.*32 channels.*got 5"):
        layers.GroupNormAct(5, CHANNELS)
    with pytest.raises(ValueError, match=r"scale.*expected shape \(4, 32\)"):
        layers.GroupNormAct(8, CHANNELS)(torch.randn(SHAPES[4]), scale=torch.randn(CHANNELS))
    with pytest.raises(ValueError, match=r"expected 32 channels.*got shape \(2, 16"):
        layers.InstanceNormAct(CHANNELS)(torch.randn(2, 16, 4, 4))


def test_unfuse_takes_it_back():
    fused, plain = pair(nn.GroupNorm(8, CHANNELS), nn.SiLU())
    genai_fast.unfuse(fused)
    assert type(fused) is nn.Sequential and torch.equal(fused(torch.ones(SHAPES[4])), plain(torch.ones(SHAPES[4])))
