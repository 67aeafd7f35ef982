"""rotary beyond test_ops.py: what makes it a position embedding, layouts, caches, and the tables."""

import math

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [backend for backend in ("reference", "cpu", "triton") if not unavailable(backend, DEVICE)]
NATIVE = [backend for backend in BACKENDS if backend != "reference"]
BOTH = pytest.mark.parametrize("interleaved", [False, True], ids=("halves", "pairs"))


def _normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@BOTH
def test_lengths_stay(backend, interleaved):
    x = _normal(2, 3, 50, 64)
    y = ops.rotary(x, *ops.rotary_tables(50, 64, device=DEVICE), interleaved=interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=2e-6, atol=0)
    assert torch.equal(y[:, :, 0], x[:, :, 0])  # position 0 turns nothing
    assert not torch.allclose(y[:, :, 1:], x[:, :, 1:], atol=0.1)


@BOTH
def test_products_depend_on_the_distance_alone(backend, interleaved):
    """The same query and key at every pair of positions: q_m . k_n is a function of m - n."""
    tokens, tables = 40, ops.rotary_tables(40, 32, device=DEVICE)
    q, k = (_normal(1, 1, 1, 32, seed=seed).expand(1, 1, tokens, 32) for seed in (1, 2))
    q, k = (ops.rotary(t, *tables, interleaved=interleaved)[0, 0] for t in (q, k))
    products = q @ k.T
    for distance in range(1 - tokens, tokens):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=3e-5)
    assert float(products.std()) > 0.5  # and on nothing less


@BOTH
def test_backward_turns_back(backend, interleaved):
    x, tables = _normal(2, 3, 20, 24).requires_grad_(), ops.rotary_tables(20, 16, device=DEVICE)
    y = ops.rotary(x, *tables, interleaved=interleaved)
    (back,) = torch.autograd.grad(y, x, y.detach(), create_graph=True)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


@BOTH
def test_a_gradient_of_the_gradient_is_the_rotation_again(backend, interleaved):
    x, tables = _normal(2, 3, 20, 24), ops.rotary_tables(20, 16, device=DEVICE)
    upstream = _normal(2, 3, 20, 24, seed=2).requires_grad_()
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(ops.rotary(leaf, *tables, interleaved=interleaved), leaf, upstream, create_graph=True)
    (again,) = torch.autograd.grad(g, upstream, x)
    assert torch.equal(again, ops.rotary(x, *tables, interleaved=interleaved))


def test_the_two_conventions_differ_by_the_order_of_channels(backend):
    x, tables = _normal(2, 3, 7, 16), ops.rotary_tables(7, 16, device=DEVICE)
    halves = ops.rotary(x, *tables)
    pairs = ops.rotary(torch.stack(x.chunk(2, -1), -1).flatten(-2), *tables, interleaved=True)
    torch.testing.assert_close(torch.cat((pairs[..., ::2], pairs[..., 1::2]), -1), halves, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@BOTH
def test_a_cache_goes_on_where_it_ended(backend, interleaved, dtype):
    """Offset, positions of all and positions of each sample say the same, to the bit; the last channels stay."""
    tables = ops.rotary_tables(30, 12, device=DEVICE)
    x = _normal(3, 2, 30, 16, dtype=dtype)
    whole = ops.rotary(x, *tables, interleaved=interleaved)
    assert torch.equal(whole[..., 12:], x[..., 12:])
    for start, stop in ((0, 1), (1, 17), (17, 30), (30, 30)):
        part, at = x[:, :, start:stop], torch.arange(start, stop, device=DEVICE)
        for more in (dict(offset=start), dict(positions=at), dict(positions=at.repeat(3, 1))):
            got = ops.rotary(part, *tables, interleaved=interleaved, **more)
            assert torch.equal(got, whole[:, :, start:stop])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = ops.rotary(x[:, :, order], *tables, interleaved=interleaved, positions=order)
    assert torch.equal(got, whole[:, :, order])


def test_layouts(backend):
    """Heads inside tokens stay there, also through backward; all else becomes contiguous."""
    tables, (batch, heads, tokens, columns) = ops.rotary_tables(5, 8, device=DEVICE), (2, 3, 5, 8)
    by_token, by_head = (120, 8, 24, 1), (120, 40, 8, 1)
    packed = _normal(batch, tokens, 3, heads, columns)[:, :, 1].transpose(1, 2)
    given = {
        "packed": (packed, by_token),
        "by_token": (packed.transpose(1, 2).contiguous().transpose(1, 2), by_token),
        "contiguous": (packed.contiguous(), by_head),
        "channels_apart": (packed.transpose(2, 3).contiguous().transpose(2, 3), by_head),
        "expanded": (packed[:1, :1, :1].expand(batch, heads, tokens, columns), by_head),
    }
    for name, (x, strides) in given.items():
        leaf = x.detach().requires_grad_()
        y = ops.rotary(leaf, *tables)
        assert y.stride() == strides, name
        torch.testing.assert_close(y, ops.rotary(x.contiguous(), *tables), rtol=0, atol=0)
        for upstream in (torch.randn_like(y), torch.randn(y.shape, device=DEVICE)):
            (g,) = torch.autograd.grad(y, leaf, upstream, retain_graph=True)
            assert torch.equal(g, torch.autograd.grad(y, leaf, upstream.contiguous(), retain_graph=True)[0]), name
    assert ops.rotary(packed.transpose(1, 2)[:, :1], *tables).is_contiguous()


@BOTH
def test_a_position_that_the_table_lacks_comes_out_as_nan(backend, interleaved):
    """Where nobody looks at positions first: past the public function's checks, as on a GPU."""
    x, tables = _normal(2, 3, 5, 8), ops.rotary_tables(4, 6, device=DEVICE)
    at = torch.tensor([[0, 4, 1, -1, 3], [3, 2, 1, 0, 2**40]], device=DEVICE)
    y = torch.ops.genai_fast.rotary(x, *tables, at, 0, interleaved, False, False, (), backend)
    lacking = ((at < 0) | (at > 3))[:, None, :, None]
    assert torch.equal(y[..., :6].isnan(), lacking.expand(2, 3, 5, 6))
    assert torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.skipif(DEVICE == "cpu", reason="CPU tensors are looked at")
def test_on_a_gpu_nobody_waits_for_positions():
    x, tables = _normal(1, 2, 3, 8), ops.rotary_tables(4, 8, device=DEVICE)
    assert ops.rotary(x, *tables, positions=torch.tensor([0, 1, 4], device=DEVICE))[:, :, 2].isnan().all()


def test_compiled_with_positions_and_with_a_growing_offset():
    torch._dynamo.reset()
    x, tables = _normal(2, 3, 4, 8), ops.rotary_tables(64, 8, device=DEVICE)
    at = torch.randint(64, (2, 4), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    compiled = torch.compile(ops.rotary, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *tables, positions=at), ops.rotary(x, *tables, positions=at))
    for offset in (0, 3, 17, 60):
        assert torch.equal(compiled(x, *tables, offset=offset), ops.rotary(x, *tables, offset=offset))


def test_tables_are_exact():
    cos, sin = ops.rotary_tables(5000, 10, base=500.0)
    assert cos.shape == sin.shape == (5000, 5)
    for position, i in ((0, 0), (1, 4), (4999, 0), (4999, 3)):
        angle = position * 500.0 ** (-2 * i / 10)
        assert float(cos[position, i]) == pytest.approx(math.cos(angle), abs=1e-7)
        assert float(sin[position, i]) == pytest.approx(math.sin(angle), abs=1e-7)
    narrow = ops.rotary_tables(50, 10, base=500.0, dtype=torch.bfloat16)
    assert torch.equal(narrow[0], cos[:50].bfloat16()) and torch.equal(narrow[1], sin[:50].bfloat16())
    with torch.device("meta"):
        assert ops.rotary_tables(5, 4)[0].is_meta and not ops.rotary_tables(5, 4, device="cpu")[0].is_meta


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, 3), ValueError, "dim: expected an even number.*got 3"),
        ((5, 0), ValueError, "dim: expected at least 2, got 0"),
        ((-1, 4), ValueError, "positions_max: expected at least 0, got -1"),
        ((5.0, 4), TypeError, "positions_max: expected an int, got float"),
        ((5, 4, -1.0), ValueError, "base: expected a number above 0"),
    ],
)
def test_bad_tables_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"^rotary_tables: {message}"):
        ops.rotary_tables(*arguments)


@pytest.mark.parametrize("backend", NATIVE)
def test_raw_operators_refuse_what_would_read_foreign_memory(backend):
    x, (cos, sin) = _normal(2, 3, 5, 8), ops.rotary_tables(5, 8, device=DEVICE)
    at, settings = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE), (0, False, False, False, (), backend)
    for arguments in (
        (x[0], cos, sin, None),
        (x[..., :6], cos, sin, None),
        (x, cos, sin[:4], None),
        (x, cos, sin[:, :3], None),
        (x, cos.half(), sin.half(), None),
        (x, cos, sin.half(), None),
        (x, cos[:, :0], sin[:, :0], None),
        (x, cos, sin, at.int()),
        (x, cos, sin, at[:, :4]),
        (x, cos, sin, at[:1]),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            torch.ops.genai_fast.rotary(*arguments, *settings)
    of_axes = cos.expand(2, 5, 4)
    for table, sections in ((cos.expand(3, 5, 4), ()), (of_axes, (1, 2)), (of_axes, (1, 1, 2)), (cos, (2, 2))):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            torch.ops.genai_fast.rotary(x, table, table, None, 0, False, False, False, sections, backend)
