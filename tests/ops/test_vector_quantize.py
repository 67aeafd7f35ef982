"""vector_quantize and segment_sum: nearest codes, and the layer that trains a codebook."""

import pytest
import torch
import torch.nn.functional as F

from genai_fast import ops, use_backend
from genai_fast.layers import VectorQuantizer
from genai_fast.ops import rows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(500, 64, 512), (131, 3, 77), (64, 1, 1000), (50, 300, 65)])
def test_no_code_is_nearer(shape, dtype):
    """By distances in float64, to within the rounding of the largest summand."""
    count, columns, codes = shape
    x, codebook = torch.randn(count, columns).to(dtype), torch.randn(codes, columns)
    quantized, indices = ops.vector_quantize(x, codebook)
    distances = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, indices[:, None])[:, 0]
    room = 4e-7 * (x.double().norm(dim=1) + codebook.norm(dim=1).max()) ** 2
    assert (chosen - distances.amin(1) <= room).all() and torch.equal(quantized, codebook[indices])


def test_a_permuted_codebook_gives_permuted_indices():
    x, codebook, order = torch.randn(200, 24), torch.randn(150, 24), torch.randperm(150)
    indices = ops.vector_quantize(x, codebook)[1]
    assert torch.equal(order[ops.vector_quantize(x, codebook[order])[1]], indices)
    assert torch.equal(ops.vector_quantize(x[17:18], codebook)[1], indices[17:18])


def test_the_matrix_of_distances_never_exists():
    x, codebook = torch.randn(4096, 16), torch.randn(4096, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.vector_quantize(x, codebook)
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert allocated < 4096 * 4096  # bytes; the matrix would have four times as many


def quantizer(**settings):
    return VectorQuantizer(16, 8, **settings)


def test_gradients_go_straight_through():
    layer, x = quantizer().train(), torch.randn(6, 8, 5, 5, requires_grad=True)
    layer(x)
    quantized, indices, loss, _ = layer.eval()(x)
    upstream = torch.randn_like(quantized)
    (grad,) = torch.autograd.grad(quantized, x, upstream, retain_graph=True)
    assert torch.equal(grad, upstream) and indices.shape == (6, 5, 5)
    assert torch.equal(quantized, layer.codebook[indices].movedim(-1, 1))
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 2 * 0.25 * (x - quantized).detach() / x.numel())


def test_a_codebook_that_gradients_train():
    layer, x = quantizer(decay=0.0), torch.randn(6, 8, 5, requires_grad=True)
    quantized, indices, loss, _ = layer(x)
    (grad,) = torch.autograd.grad(loss, layer.codebook)
    codes = layer.codebook.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(F.mse_loss(codes[indices].movedim(-1, 1), x.detach()), codes)
    torch.testing.assert_close(grad, wanted)
    assert not torch.autograd.grad(quantized.sum(), layer.codebook, allow_unused=True)[0]


def test_moving_averages():
    """Equations 6 to 8 of the paper, of codes that are all in use."""
    layer, x = quantizer(decay=0.9, revive=0.0), torch.randn(40, 8, 3)
    flat = x.movedim(1, -1).reshape(-1, 8).double()
    counts, sums, codebook = (t.double() for t in (layer.counts, layer.sums, layer.codebook))
    for _ in range(5):
        chosen = F.one_hot(torch.cdist(flat, codebook).argmin(1), 16).double()
        counts, sums = 0.9 * counts + 0.1 * chosen.sum(0), 0.9 * sums + 0.1 * chosen.T @ flat
        codebook = torch.where((counts > 0)[:, None], sums / counts[:, None], codebook)
        perplexity = layer(x).perplexity
        share = chosen.mean(0)
        assert perplexity.item() == pytest.approx(torch.exp(-torch.special.xlogy(share, share).sum()).item(), rel=1e-5)
    torch.testing.assert_close(layer.codebook.double(), codebook, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.counts.double(), counts, rtol=1e-4, atol=1e-5)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    layer.eval()(x)
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_unused_codes_become_vectors_of_the_batch():
    layer, x = quantizer(), torch.randn(30, 8) + 50.0
    with torch.random.fork_rng():
        places = torch.randint(30, (16,))
    layer(x)
    torch.testing.assert_close(layer.codebook, x[places])  # all of them: none was near
    first = layer.codebook.clone()
    for _ in range(400):
        layer(x[:1] + 1e-3 * torch.randn(20, 8))
    assert (layer.codebook - x[0]).norm(dim=1).max() < 1.0 < (first - x[0]).norm(dim=1).max()


def test_half_precision_and_layouts_agree():
    x = torch.randn(4, 8, 6, 6)
    expected = quantizer_state(x)
    for same in (x.to(memory_format=torch.channels_last), x.movedim(1, -1).contiguous().movedim(-1, 1)):
        assert all(map(torch.equal, quantizer_state(same), expected))
    with use_backend("reference"):
        for found, wanted in zip(quantizer_state(x), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    layer = quantizer().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
    assert found.quantized.dtype is found.loss.dtype is torch.float32
    assert torch.equal(found.indices, layer(x.bfloat16().float()).indices)


def quantizer_state(x):
    torch.manual_seed(1)
    layer = quantizer()
    for _ in range(3):
        layer(x)
    return [*layer.state_dict().values()]


def test_rows_of_two_processes(monkeypatch):
    """What all_reduce adds up is what one process has of the joined batch."""
    x, states = torch.randn(10, 8, 3), []
    layer = quantizer()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for begin, end in ((0, 6), (6, 10)):
        sent = []
        monkeypatch.setattr(torch.distributed, "all_reduce", sent.append)
        with rows.having(rows.Rows(begin, end - begin, 10)):
            other = quantizer()
            other.load_state_dict(layer.state_dict())
            torch.manual_seed(3)
            other(x[begin:end])
        states.append(sent[0].clone())
    monkeypatch.undo()
    torch.manual_seed(3)
    flat = x.movedim(1, -1).reshape(-1, 8)
    drawn = flat[torch.randint(30, (16,))]
    sums, counts = ops.segment_sum(flat, layer.eval()(x).indices.flatten(), 16)
    torch.testing.assert_close(states[0] + states[1], torch.cat([drawn, sums, counts[:, None]], 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codes": 0}, "codes: expected at least 1, got 0"),
        ({"decay": 1.0}, r"decay: expected a float in \[0, 1\), got 1.0"),
        ({"commitment": -1.0}, "commitment: expected .*got -1.0"),
        ({"revive": float("nan")}, r"revive: expected a float in \[0, 1\), got nan"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"codes": 4, "dim": 2} | settings)
    with pytest.raises(ValueError, match=r"x: expected \[N, 8, \.\.\.\], got shape \(2, 7, 3\)"):
        quantizer()(torch.zeros(2, 7, 3))
