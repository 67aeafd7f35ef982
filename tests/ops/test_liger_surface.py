"""The arguments of Liger-Kernel's functions in ours, each against its formula in float64.

The tables name Liger's arguments (0.8.5) and say how they are passed here. What has no counterpart: `in_place` of its
RMS norm, which writes over the upstream gradient; `accum_dtype`, since sums over chunks are in float32 always; and
`size_average` and `reduce`, which it takes and ignores.
"""

import itertools

import pytest
import torch
from torch.testing import assert_close

from genai_fast import ops
from genai_fast.layers import GEGLU, CrossEntropyLoss, LinearCrossEntropyLoss, RMSNorm, SwiGLU

NAMES = {"weight": "class_weight", "ce_weight": "class_weight", "lse_square_scale": "z_loss",
         "use_token_scaling": "token_scaling"}  # fmt: skip
OUTPUTS = dict(return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True)
CLOSE = {torch.float32: dict(rtol=2e-5, atol=2e-6), torch.bfloat16: dict(rtol=2e-2, atol=5e-3)}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _ours(arguments):
    return {NAMES.get(name, name): value for name, value in arguments.items()}


def _normal(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def _wide(*tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def _gradients(loss, inputs):
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


def _cross_entropy(
    logits, target, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
    softcap=None, use_token_scaling=False,
):  # fmt: skip
    """(loss, z-loss, accuracy, predicted) of logits [N, V] in float64, term by term."""
    counted = target != ignore_index
    t, w = target.where(counted, 0), torch.ones(logits.size(-1)).double() if weight is None else weight.double()
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    below = torch.logsumexp(x, -1, keepdim=True) - x  # -ln softmax
    loss = (1 - label_smoothing) * w[t] * below.gather(-1, t[:, None])[:, 0] + label_smoothing * (w * below).mean(-1)
    penalty = lse_square_scale * torch.logsumexp(x, -1) ** 2
    scale = counted * ((-below.gather(-1, t[:, None])[:, 0]).exp().detach() if use_token_scaling else 1.0)
    loss, penalty = loss * scale, penalty * scale
    predicted = logits.argmax(-1)
    right = (predicted == target) & counted
    if reduction != "none":
        mean = reduction == "mean"
        loss = loss.sum() / (w[t] * counted).sum() if mean else loss.sum()
        penalty = penalty.sum() / counted.sum() if mean else penalty.sum()
        right = right.sum() / counted.sum()
    return loss + penalty, penalty, right.double(), predicted.where(counted, -1)


def _settings(**more):
    """Of the losses: each value of each argument meets each of the others."""
    grid = dict(ignore_index=(-100, 3), label_smoothing=(0.0, 0.1), lse_square_scale=(0.0, 1e-2), softcap=(None, 3.0),
                reduction=("mean", "sum", "none"), weight=(None, torch.rand(13) + 0.5), **more)  # fmt: skip
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _agree(found, expected, dtype, inputs, wide):
    loss, z_loss, accuracy, predicted = found
    truth, penalty, right, places = expected
    for got, exact in ((loss, truth), (z_loss, penalty), (accuracy, right)):
        assert_close(got.double(), exact, **CLOSE[torch.float32 if dtype is torch.float32 else dtype])
    assert torch.equal(predicted, places)
    assert not z_loss.requires_grad and not accuracy.requires_grad
    upstream = torch.randn(truth.shape)
    grads = zip(_gradients((loss * upstream).sum(), inputs), _gradients((truth * upstream).sum(), wide), strict=True)
    for got, exact in grads:
        assert_close(got, exact, **CLOSE[dtype])


@DTYPES
def test_cross_entropy(dtype):
    logits, target = _normal(7, 13, dtype=dtype, scale=3.0), torch.tensor([0, 3, -100, 12, 3, 7, 1])
    for settings in _settings():
        valid = target if settings["ignore_index"] == -100 else target.clamp(min=0)
        (wide,) = _wide(logits)
        found = ops.cross_entropy(logits, valid, **_ours(settings), **OUTPUTS)
        _agree(found, _cross_entropy(wide, valid, **settings), dtype, [logits], [wide])
        alone = ops.cross_entropy(logits, valid, **_ours(settings))
        assert torch.equal(alone, found.loss) and isinstance(alone, torch.Tensor)


def test_linear_cross_entropy():
    x, weight, bias = _normal(7, 5), _normal(13, 5, scale=2.0), _normal(13)
    target = torch.tensor([0, 3, -100, 12, 3, 7, 1])
    for settings in _settings(use_token_scaling=(False, True)):
        valid = target if settings["ignore_index"] == -100 else target.clamp(min=0)
        wide = _wide(x, weight, bias)
        found = ops.linear_cross_entropy(x, weight, valid, bias, chunk=3, **_ours(settings), **OUTPUTS)
        expected = _cross_entropy(torch.nn.functional.linear(*wide), valid, **settings)
        _agree(found, expected, torch.float32, [x, weight, bias], wide)


def test_scaling_of_a_plain_cross_entropy_is_a_line():
    logits, target = _normal(6, 13), torch.arange(6)
    loss = ops.cross_entropy(logits, target, reduction="none")
    loss = (loss * (-loss).exp().detach()).sum() / loss.numel()
    (wide,) = _wide(logits)
    truth = _cross_entropy(wide, target, use_token_scaling=True)[0]
    assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    assert_close(_gradients(loss, [logits])[0], _gradients(truth, [wide])[0], rtol=1e-5, atol=1e-6)


def test_predictions_of_equal_infinite_and_missing_logits():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, 2.0, 2.0], [nan, 0.0, 1.0], [-inf, -inf, -inf], [40.0, 50.0, 0.0], [0.0, inf, inf]])
    target = torch.tensor([1, 0, 0, 1, -100])
    found = ops.cross_entropy(logits, target, softcap=1.0, reduction="none", **OUTPUTS)
    assert found.predicted_tokens.tolist() == [1, 2, 0, 1, -1]
    assert found.token_accuracy.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_weights_of_zero_and_nothing_that_counts():
    logits, weight = _normal(3, 4), torch.tensor([0.0, 1.0, 1.0, 1.0])
    for target in (torch.tensor([0, 0, 0]), torch.tensor([-100] * 3)):
        expected = torch.nn.functional.cross_entropy(logits, target, weight)
        assert torch.isnan(ops.cross_entropy(logits, target, class_weight=weight)) and torch.isnan(expected)
    x, head = _normal(3, 2), _normal(4, 2)
    loss = ops.linear_cross_entropy(x, head, torch.tensor([-100] * 3), class_weight=weight)
    assert not torch.stack([g.abs().max() for g in torch.autograd.grad(loss, (x, head))]).any()


@DTYPES
@pytest.mark.parametrize("mode", ["llama", "gemma", "none"])
def test_rms_norm(mode, dtype):
    """offset, casting_mode, no weight; with a residual as fused_add_rms_norm."""
    eps = 1e-6
    for offset, affine, added in itertools.product((0.0, 1.0), (True, False), (False, True)):
        x, residual = _normal(6, 40, dtype=dtype), _normal(6, 40, dtype=dtype)
        weight = _normal(40, dtype=dtype) if affine else None
        given = [t for t in (x, residual if added else None, weight) if t is not None]
        shift = offset if affine else 0.0
        found = ops.rms_norm(x, weight, eps, residual if added else None, shift, mode)
        y, h = found if added else (found, x)
        wide = _wide(*given)
        h64 = wide[0] + wide[1] if added else wide[0]
        truth = h64 * torch.rsqrt(h64.square().mean(-1, keepdim=True) + eps)
        truth = truth * (shift + wide[-1]) if affine else truth
        limits = dict(rtol=5e-2, atol=5e-2) if dtype is torch.bfloat16 else CLOSE[dtype]
        assert_close(y.double(), truth, **limits)
        upstream = torch.randn(y.shape).to(dtype)
        mine, exact = _gradients((y * upstream).sum(), given), _gradients((truth * upstream).sum(), wide)
        for got, expected in zip(mine, exact, strict=True):
            assert_close(got, expected, rtol=limits["rtol"], atol=4 * limits["atol"])
        if dtype is torch.bfloat16 and mode != "none":  # whose means PyTorch rounds twice on a CPU
            assert (y == _written(h.detach(), weight, eps, shift, mode)).double().mean() > 0.99


def _written(h, weight, eps, offset, mode):
    """The norm in bfloat16 as models write it: where it is rounded shows in many of its numbers."""
    y = h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(h.dtype)
    return ((y if mode == "gemma" else y.to(h.dtype).float()) * (offset + weight.float())).to(h.dtype)


def test_casting_modes_differ_in_bfloat16_alone():
    for dtype, differ in ((torch.float32, False), (torch.bfloat16, True)):
        x, weight = torch.randn(9, 64).to(dtype), torch.randn(64).to(dtype)
        results = [ops.rms_norm(x, weight, 1e-6, casting_mode=mode) for mode in ("gemma", "llama", "none")]
        assert all(torch.equal(*pair) != differ for pair in itertools.combinations(results, 2))


def _turned(x, cos, sin):
    """Hugging Face's apply_rotary_pos_emb of x [B, H, T, D] in float64; cos and sin [B or 1, T, D_rot]."""
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    turned, kept = x.split((cos.size(-1), x.size(-1) - cos.size(-1)), -1)
    a, b = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, kept), -1)


def _complex(x, freqs):
    """Llama 4's apply_rotary_emb of x [B, T, H, D] in float64; freqs [B or 1, T, D / 2]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs.to(torch.complex128).unsqueeze(2)).flatten(-2)


def _axes(table, sections):
    """Qwen2-VL's choice of channels from tables [3, B, T, D]."""
    return torch.cat([m[i % 3] for i, m in enumerate(table.split(sections * 2, -1))], -1)


def _tables(*shape, dtype):
    angles = torch.cat((torch.randn(*shape),) * 2, -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


B, T, D = 2, 6, 16
ROTARY = {  # (made of (x [B, H, T, D], dtype)): ours, and the formula
    "tables of all": lambda x, cos, sin: (
        ops.rotary(x, cos[:1], sin[:1], full=True), _turned(x.double(), cos[:1], sin[:1])
    ),
    "tables of samples": lambda x, cos, sin: (ops.rotary(x, cos, sin, full=True), _turned(x.double(), cos, sin)),
    "one half": lambda x, cos, sin: (
        ops.rotary(x, cos[..., : D // 2], sin[..., : D // 2]), _turned(x.double(), cos, sin)
    ),
    "vision": lambda x, cos, sin: (
        ops.rotary(x[:1].transpose(1, 2)[0].unsqueeze(0).transpose(1, 2), cos[0], sin[0], full=True),
        _turned(x[:1].double(), cos[:1], sin[:1]),
    ),
    "complex": lambda x, cos, sin: (
        ops.rotary(x, *_parts(cos, sin, 1), interleaved=True),
        _complex(x.transpose(1, 2), torch.complex(*_halves(cos, sin, 1))).transpose(1, 2),
    ),
    "complex of samples": lambda x, cos, sin: (
        ops.rotary(x, *_parts(cos, sin, B), interleaved=True),
        _complex(x.transpose(1, 2), torch.complex(*_halves(cos, sin, B))).transpose(1, 2),
    ),
}  # fmt: skip


def _halves(cos, sin, samples):
    return [table[:samples, :, : D // 2].float() for table in (cos, sin)]


def _parts(cos, sin, samples):
    freqs = torch.complex(*_halves(cos, sin, samples))
    return freqs.real, freqs.imag


@DTYPES
@pytest.mark.parametrize("name", ROTARY)
def test_rotary(name, dtype):
    """Queries and keys of other numbers of heads, as projections leave them."""
    cos, sin = _tables(B, T, D // 2, dtype=dtype)
    for heads in (4, 2):
        x = torch.randn(B, T, heads, D).to(dtype).transpose(1, 2).requires_grad_()
        found, truth = ROTARY[name](x, cos, sin)
        assert_close(found.double(), truth.double(), **CLOSE[dtype])
        upstream = torch.randn(truth.shape).to(dtype)
        (got,), (exact,) = (_gradients((y * upstream).sum(), [x]) for y in (found, truth))
        assert_close(got, exact, **CLOSE[dtype])


@DTYPES
def test_rotary_partial_and_of_axes(dtype):
    x = _normal(B, 3, T, 24, dtype=dtype)
    cos, sin = _tables(B, T, D // 2, dtype=dtype)
    assert_close(ops.rotary(x, cos, sin, full=True).double(), _turned(x.double(), cos, sin), **CLOSE[dtype])
    cos, sin = _tables(3, B, T, 12, dtype=dtype)
    for sections in ([4, 4, 4], [2, 5, 5], [12, 0, 0]):
        found = ops.rotary(x, cos, sin, full=True, sections=tuple(sections))
        truth = _turned(x.double(), _axes(cos, sections), _axes(sin, sections))
        assert_close(found.double(), truth, **CLOSE[dtype])
        half = ops.rotary(x, cos[..., :12], sin[..., :12], sections=tuple(sections))
        assert torch.equal(half, found)
        (got,), (exact,) = (_gradients((y * y.detach()).sum(), [x]) for y in (found, truth))
        assert_close(got, exact, rtol=3e-2 if dtype is torch.bfloat16 else 1e-5, atol=CLOSE[dtype]["atol"] * 10)


@DTYPES
def test_gates(dtype):
    """SwiGLU with its multipliers, GEGLU with both GELUs."""
    a, b = _normal(5, 24, dtype=dtype, scale=2.0), _normal(5, 24, dtype=dtype)
    for m, d in ((1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (1.5, -0.75)):
        wide = _wide(a, b)
        found, truth = ops.swiglu(a, b, None, m, d), d * torch.nn.functional.silu(m * wide[0]) * wide[1]
        _same(found, truth, [a, b], wide, dtype)
        packed = ops.swiglu(torch.cat((a, b), -1), gate_multiplier=m, down_multiplier=d)
        assert torch.equal(packed, found)
    for approximate in ("none", "tanh"):
        wide = _wide(a, b)
        truth = torch.nn.functional.gelu(wide[0], approximate=approximate) * wide[1]
        _same(ops.geglu(a, b, approximate=approximate), truth, [a, b], wide, dtype)


def _same(found, truth, inputs, wide, dtype):
    assert_close(found.double(), truth, **CLOSE[dtype])
    for got, exact in zip(_gradients(found.sum(), inputs), _gradients(truth.sum(), wide), strict=True):
        assert_close(got, exact, **CLOSE[dtype])


# -- layers


def test_cross_entropy_loss_with_more():
    logits, target = _normal(2, 13, 3, scale=3.0), torch.tensor([[1, 0, -100], [12, 3, 3]])
    weight = torch.rand(13) + 0.5
    layer = CrossEntropyLoss(weight, label_smoothing=0.1, z_loss=0.1, softcap=3.0, **OUTPUTS)
    found = layer(logits, target)
    rows, flat = logits.detach().double().movedim(1, -1).flatten(0, 1), target.flatten()
    loss, penalty, right, places = _cross_entropy(rows, flat, weight, -100, 0.1, 0.1, softcap=3.0)
    numbers = torch.stack((found.loss, found.z_loss, found.token_accuracy)).double()
    assert_close(numbers, torch.stack((loss, penalty, right)), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.predicted_tokens.flatten(), places)
    assert isinstance(CrossEntropyLoss(softcap=3.0)(logits, target), torch.Tensor)


def test_linear_cross_entropy_loss_with_more():
    layer, weight = LinearCrossEntropyLoss(5, 13, softcap=2.0), torch.rand(13) + 0.5
    x, target = torch.randn(4, 5), torch.tensor([1, 12, -100, 0])
    assert_close(layer(x, target), ops.cross_entropy(layer.logits(x), target))
    layer = LinearCrossEntropyLoss(5, 13, class_weight=weight, token_scaling=True, **OUTPUTS)
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert_close(layer(x, target).loss.double(), _cross_entropy(
        layer.logits(x).double(), target, weight, use_token_scaling=True)[0], rtol=1e-5, atol=1e-6)  # fmt: skip


def test_rms_norm_layer_with_an_offset():
    x = torch.randn(3, 8).bfloat16()
    layer = RMSNorm(8, 1e-6, dtype=torch.bfloat16, offset=1.0, casting_mode="llama")
    assert not layer.weight.any() and layer.state_dict().keys() == {"weight"}
    assert torch.equal(layer(x), ops.rms_norm(x, layer.weight, 1e-6, None, 1.0, "llama"))
    (by_torch,) = torch.func.vmap(lambda x: (layer(x),))(x)
    assert torch.equal(by_torch, layer(x))
    y, h = layer(x, x)
    assert torch.equal(h, x + x) and torch.equal(y, layer(h))
    for wrong in (dict(offset=1.0, elementwise_affine=False), dict(casting_mode="bert"), dict(offset=float("nan"))):
        with pytest.raises(ValueError, match="RMSNorm: "):
            RMSNorm(8, **wrong)
    with pytest.raises(ValueError, match="normalized_shape: expected one dimension"):
        RMSNorm((2, 4), offset=1.0)


@pytest.mark.parametrize("kind", [SwiGLU, GEGLU])
def test_gated_layers_with_multipliers(kind):
    layer, x = kind(4, 6, gate_multiplier=0.5, down_multiplier=2.0), torch.randn(3, 4)
    gate, up = layer.w12(x).chunk(2, -1)
    act = torch.nn.functional.silu if kind is SwiGLU else torch.nn.functional.gelu
    assert_close(layer(x), layer.w3(2.0 * act(0.5 * gate) * up))
    with pytest.raises(ValueError, match=f"{kind.__name__}: gate_multiplier: expected a finite float"):
        kind(4, 6, gate_multiplier=float("inf"))


def test_compiled_with_all_outputs():
    """A graph without breaks."""
    logits, target, weight = _normal(4, 9), torch.tensor([1, 8, -100, 0]), torch.rand(9)

    def call(logits, target):
        return ops.cross_entropy(logits, target, class_weight=weight, softcap=2.0, z_loss=0.1, **OUTPUTS)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(logits, target), call(logits, target), strict=True):
        assert_close(got, expected)
