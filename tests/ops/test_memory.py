"""Tensors that have no memory of their own, share it, or are written in place: never a wrong number, never a crash."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import genai_fast
from genai_fast import ops
from genai_fast.backends import FallbackWarning, forced_backend, select, survey, unavailable, use_backend
from genai_fast.ops import rows
from genai_fast.ops.memory import overlap, overlaps_itself
from genai_fast.optim import Adam

BACKENDS = [name for name in ("reference", "cpu", "triton") if not unavailable(name, "cpu")]
LENGTHS = torch.tensor([1, 2], dtype=torch.int32)


def _rows(*shape, **more):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), **more)


def _zero(*shape):
    return torch._efficientzerotensor(shape)


# --- tensors without memory, lazily negated ones, and those of a list


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda x, z: ops.layer_norm(x, z), (6,)),
        (lambda x, z: ops.layer_norm(x, residual=z)[1], (4, 6)),
        (lambda x, z: ops.batch_norm_act(x, z), (6,)),
        (lambda x, z: ops.bias_act(x, z), (6,)),
        (lambda x, z: ops.swiglu(x, z), (4, 6)),
        (lambda x, z: ops.reparameterize(x, z, seed=1), (4, 6)),
        (lambda x, z: ops.act_dropout(z, seed=1), (4, 6)),
        (lambda x, z: ops.vae_loss(x, z, x, z).loss, (4, 6)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_of_known_zeros_counts_as_zeros(call, shape, backend):
    x = _rows(4, 6)
    with use_backend(backend):
        assert torch.equal(call(x, _zero(*shape)), call(x, torch.zeros(shape)))


def test_every_tensor_of_a_list_is_surveyed():
    plain = [torch.ones(2) for _ in range(3)]
    assert survey((plain,)) == ("cpu", torch.float32, False)
    other = type("Other", (torch.Tensor,), {})
    for odd in (_zero(2), torch._neg_view(torch.ones(2)), torch.ones(2).as_subclass(other)):
        for k in range(3):
            assert survey(([*plain[:k], odd, *plain[k:]],))[2]


def test_a_negated_weight_of_a_list_is_read_with_its_sign():
    shapes = ((4,), (4,), (12, 4), (12,), (4, 4), (4,), (4,), (4,), (16, 4), (16,), (4, 16), (4,))
    weights = [_rows(*s) for s in ((11, 4), (6, 4), *shapes, (4,), (4,), (11, 4))]
    call = lambda w: ops.gpt_decode(torch.tensor([[1, 2]]), torch.zeros(1, 2, 1, 2, 6, 2), 0, w)  # noqa: E731
    for k in (1, 4, len(weights) - 1):
        negated = [*weights[:k], torch._neg_view(-weights[k]), *weights[k + 1 :]]
        assert torch.equal(call(negated), call(weights))


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path_factory.mktemp('dist')}/file")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_adam_leaves_sharded_parameters_to_torch(gloo, sharded):
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plain = copy.deepcopy(net)
    for k in sharded:
        fully_shard(net[k])
    x = _rows(4, 8)
    ours, theirs = Adam(net.parameters(), lr=0.1), torch.optim.Adam(plain.parameters(), lr=0.1)
    for _ in range(2):
        for model in (net, plain):
            model.zero_grad()
            model(x).square().sum().backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours.step()
        theirs.step()
        assert [w.category for w in said if w.category is FallbackWarning] == [FallbackWarning] * (_ == 0)
    for got, expected in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(getattr(got, "full_tensor", lambda g=got: g)().detach(), expected.detach())


# --- the optimizer


def _step(**changed):
    state = {name: [torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return ops.adam_step(**{**state, "steps": [torch.zeros(())], **changed})


SAME = [torch.ones(3), torch.ones(3)]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite float >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr: .*got nan"),
        ({"eps": -1.0}, ValueError, "eps: .*got -1.0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay: .*got nan"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas: .*\[0, 1\), got 1.0"),
        ({"betas": (-1, 2)}, ValueError, r"betas: .*\[0, 1\), got -1"),
        ({"betas": 0.9}, ValueError, "betas: expected two numbers"),
        ({"params": [None]}, TypeError, r"params\[0\]: expected a tensor, got NoneType"),
        ({"params": [torch.ones(3, dtype=torch.int64)]}, TypeError, r"params\[0\]: expected a floating-point"),
        ({"exp_avgs": SAME[:1], "exp_avg_sqs": SAME[:1]}, ValueError, "one tensor twice"),
        ({"params": SAME[:1], "exp_avgs": SAME[:1]}, ValueError, "one tensor twice"),
        ({"params": SAME[:1], "grads": SAME[:1]}, ValueError, "one tensor twice"),
    ],
)
def test_adam_step_refuses_what_torch_refuses_and_one_tensor_twice(changed, error, message):
    before = [t.clone() for x in changed.values() if isinstance(x, list) for t in x if t is not None]
    with pytest.raises(error, match=f"adam_step: {message}" if "twice" not in message else message):
        _step(**changed)
    after = [t for x in changed.values() if isinstance(x, list) for t in x if t is not None]
    assert all(map(torch.equal, before, after))


def test_adam_step_refuses_a_parameter_given_twice_and_a_shared_step():
    lists = {name: [torch.ones(3), torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    steps, step = [torch.zeros(()), torch.zeros(())], torch.zeros(())
    for changed in ({"params": SAME[:1] * 2, "steps": steps}, {"steps": [step, step]}):
        with pytest.raises(ValueError, match="one tensor twice"):
            ops.adam_step(**{**lists, **changed})


@pytest.mark.parametrize("eps", [1e-20, 1e-17, 1e-15, 1e-8, 0.0])
def test_a_tiny_eps_steps_as_float64_does(eps):
    for gradient in (1e-18, 1e-12, 1.0):
        steps = []
        for dtype, optimizer in ((torch.float32, Adam), (torch.float64, torch.optim.Adam)):
            p = nn.Parameter(torch.ones(1, dtype=dtype))
            made = optimizer([p], lr=0.1, eps=eps)
            p.grad = torch.full_like(p, gradient)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                made.step()
            steps.append(p.detach().double())
        torch.testing.assert_close(*steps, rtol=0, atol=1e-3 * 0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_parameter_twice_steps_as_torch_does():
    def stepped(optimizer, make):
        p = nn.Parameter(torch.ones(3))
        q = nn.Parameter(p.data)
        given = make(p, q)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            made = optimizer(given, lr=0.1)
            for x in (p, q):
                x.grad = torch.full((3,), 0.5)
            made.step()
        return p.detach()

    for make in (lambda p, q: [p, p], lambda p, q: [p, q], lambda p, q: [{"params": [p]}, {"params": [q]}]):
        assert torch.equal(stepped(Adam, make), stepped(torch.optim.Adam, make))


# --- caches that are written in place


def _decode(k_cache, v_cache, new=True):
    k = _rows(2, 2, 1, 4)
    return ops.decode_attention(_rows(2, 2, 1, 4), k_cache, v_cache, LENGTHS, *((k, k) if new else ()))


def _caches():
    return {
        "packed first": torch.zeros(2, 2, 2, 8, 4).unbind(),
        "packed last": torch.zeros(2, 2, 8, 2, 4).unbind(3),
        "interleaved heads": torch.zeros(2, 8, 4, 4).transpose(1, 2).split(2, 1),
        "tokens first": torch.zeros(2, 8, 2, 2, 4).permute(3, 0, 2, 1, 4).unbind(),
        "one channel in two": torch.zeros(2, 2, 2, 8, 4, 2)[..., 0].contiguous().unbind(),
    }


@pytest.mark.parametrize("name", _caches())
def test_views_of_one_packed_cache_are_taken(name):
    k, v = _caches()[name]
    assert torch.equal(_decode(k, v), _decode(k.clone(), v.clone()))


def test_caches_that_share_memory_are_refused():
    cache, wide = torch.zeros(2, 2, 8, 4), torch.zeros(2, 3, 8, 4)
    with pytest.raises(ValueError, match="k_cache: expected memory of its own"):
        _decode(cache[:1].expand(2, -1, -1, -1), cache.clone())
    with pytest.raises(ValueError, match="v_cache: expected memory of its own"):
        _decode(cache.clone(), torch.zeros(200).as_strided((2, 2, 8, 4), (40, 20, 2, 1)))
    for pair in ((cache, cache), (cache, cache.view_as(cache)), (wide[:, :2], wide[:, 1:])):
        with pytest.raises(ValueError, match="v_cache: expected other memory than k_cache"):
            _decode(*pair)
    assert _decode(cache, cache, new=False).shape == (2, 2, 1, 4)  # nothing is written


def test_overlap_is_what_the_addresses_say():
    memory = torch.zeros(64)
    found = set()
    for shape, strides in (((2, 3), (8, 2)), ((2, 3), (2, 8)), ((3, 2), (7, 3)), ((2, 2, 2), (1, 9, 3)), ((4,), (3,))):
        x = memory.as_strided(shape, strides)
        address = {i for i in torch.arange(64).as_strided(shape, strides).flatten().tolist()}
        assert overlaps_itself(x) == (len(address) < x.numel())
        for start in range(30):
            y = memory.as_strided(shape, strides, start)
            expected = not address.isdisjoint(i + start for i in address)
            assert overlap(x, y) == overlap(y, x) == expected
            found.add(expected)
    assert found == {True, False}


@pytest.mark.parametrize("through", ["op", "library"])
def test_a_write_into_a_cache_is_seen_by_autograd(through):
    def decode(k_cache, v_cache, *new):
        q = _rows(2, 2, 1, 4)
        if through == "op":
            return ops.decode_attention(q, k_cache, v_cache, LENGTHS, *new)
        return torch.ops.genai_fast.decode_attention(
            q, k_cache, v_cache, LENGTHS, *(new or (None, None)), 0.5, 0, 0.0, ""
        )

    weight, k_cache, v_cache = torch.ones(1, requires_grad=True), _rows(2, 2, 8, 4), _rows(2, 2, 8, 4)
    y = (weight * k_cache).sum()
    decode(k_cache, v_cache)  # reads alone
    y.backward(retain_graph=True)
    decode(k_cache, v_cache, _rows(2, 2, 1, 4), _rows(2, 2, 1, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        decode(torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4), _rows(2, 2, 1, 4), _rows(2, 2, 1, 4))


def _gpt(heads=1, channels=2):
    c = channels
    shapes = ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (16, c), (16,), (c, 16), (c,))
    weights = [_rows(*s) for s in ((11, c), (6, c), *shapes, (c,), (c,), (11, c))]
    return torch.tensor([[1]]), torch.zeros(1, 2, 1, heads, 6, c // max(heads, 1)), 0, weights


def test_gpt_decode_counts_its_write_and_refuses_a_cache_with_a_gradient():
    ids, cache, length, weights = _gpt()
    before = cache._version
    ops.gpt_decode(ids, cache, length, weights)
    assert cache._version > before
    with pytest.raises(ValueError, match="cache: expected tensors that need no gradient"):
        ops.gpt_decode(ids, cache.requires_grad_(), length, weights)
    with torch.no_grad():
        ops.gpt_decode(ids, cache, length, weights)


def test_gpt_decode_of_no_heads_is_refused():
    for heads, channels in ((0, 0), (1, 0)):
        ids, cache, length, weights = _gpt(heads, channels)
        with pytest.raises(ValueError, match="at least 1 head and 1 channel"):
            ops.gpt_decode(ids, cache, length, weights)
        with pytest.raises(ValueError, match="gpt_decode: weights: expected at least one channel"):
            torch.ops.genai_fast.gpt_decode(cache, ids, length, weights, [], 1e-5, False, "")


# --- beginnings of packed sequences, where nothing else has looked at them


BEGINNINGS = [
    ([0, 900000, 6], "cu_seqlens_q: expected numbers that do not fall"),
    ([-4, 2, 6], "cu_seqlens_q: expected 0 first"),
    ([0, 2, 9], "cu_seqlens_q: expected the number of rows last"),
    ([0, 2, 4], "cu_seqlens_q: expected the number of rows last"),
    ([1, 6], "cu_seqlens_q: expected 0 first"),
    ([0, 4, 2, 6], "cu_seqlens_q: expected numbers that do not fall"),
    ([], r"expected beginnings \[N \+ 1\]"),
]


@pytest.mark.parametrize(("starts", "message"), BEGINNINGS)
def test_wrong_beginnings_are_refused_in_compiled_and_library_calls(starts, message):
    q, s = _rows(1, 2, 6, 8), torch.tensor(starts, dtype=torch.int32)
    compiled = torch.compile(lambda q, s: ops.causal_attention(q, q, q, cu_seqlens_q=s), backend="eager")
    with pytest.raises(ValueError, match=message):
        compiled(q, s)
    settings = (6, 6, None, 0.5, 0, 0.0, True, 0.0, 0, "")
    with pytest.raises(ValueError, match=message):
        torch.ops.genai_fast.causal_attention(q, q, q, s, s, *settings)
    out, lse = torch.ops.genai_fast.causal_attention(q, q, q, None, None, *settings)
    with pytest.raises(ValueError, match=message):
        torch.ops.genai_fast.causal_attention_backward(q, None, q, q, q, out, lse, s, s, *settings)
    with pytest.raises(ValueError, match="lse and its gradient"):
        arguments = (q, torch.ones(1), q, q, q, out, lse, None, None)
        torch.ops.genai_fast.causal_attention_backward(*arguments, *settings)


# --- settings of with-blocks in threads


def _interleaved(first, second, read):
    """What two threads read in with-blocks that end in the order in which they began."""
    events, found = [threading.Event() for _ in range(3)], {}

    def one():
        with first:
            events[0].set()
            events[1].wait(60)
            found["one"] = read()
        events[2].set()

    def two():
        events[0].wait(60)
        with second():
            events[1].set()
            events[2].wait(60)
            found["two"] = read()

    threads = [threading.Thread(target=f) for f in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found["one"], found["two"]


def test_threads_do_not_leave_a_backend_behind():
    class Enter:
        def __enter__(self):
            self.block = use_backend("reference")
            self.block.__enter__()

        def __exit__(self, *exception):
            self.block.__exit__(*exception)

    assert _interleaved(Enter(), lambda: use_backend("cpu"), forced_backend) == ("reference", "cpu")
    assert forced_backend() == ""


def test_threads_do_not_leave_rows_behind():
    ours, theirs = rows.Rows(2, 2, 8), rows.Rows(4, 2, 8)
    assert _interleaved(rows.having(ours), lambda: rows.having(theirs), rows.mine) == (ours, theirs)
    assert rows.mine() is None


def test_a_backend_chosen_for_good_lasts_beyond_blocks():
    try:
        use_backend("reference")
        for _ in range(3):
            use_backend("cpu")
        with use_backend(None):
            assert forced_backend() == ""
            use_backend("reference")  # undone with the block, as all that is done inside it
        assert forced_backend() == "cpu"
        found = []
        thread = threading.Thread(target=lambda: found.append(forced_backend()))
        thread.start()
        thread.join()
        assert found == ["cpu"]  # one that has chosen nothing follows the process
    finally:
        use_backend(None)
    assert forced_backend() == ""


def test_an_inner_block_leaves_switches_as_it_found_them():
    from genai_fast import cpu, sdpa

    with genai_fast.enable_sdpa():
        with genai_fast.enable_sdpa():
            pass
        assert sdpa._active is not None
    assert sdpa._active is None
    with genai_fast.tune_cpu(matmul=False, memory=False):
        with genai_fast.tune_cpu():
            pass
        assert cpu.active() is not None
    assert cpu.active() is None


def test_a_compiled_call_follows_the_backend():
    compiled = torch.compile(lambda x: ops.act_dropout(x, 0.5, seed=3), fullgraph=True, backend="eager")
    x = _rows(4, 6)
    expected = compiled(x)
    calls = []
    original = select("act_dropout", "reference", "cpu", torch.float32)
    with use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("genai_fast.ops.register.select", lambda *a: calls.append(a[1]) or original)
        assert torch.equal(compiled(x), expected)
    assert calls == ["reference"]
