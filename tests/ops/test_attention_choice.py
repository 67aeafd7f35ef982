"""Attention on CUDA by the fastest of our kernels, cuDNN's and flash attention: the clock and the peers are made up."""

import warnings

import pytest
import torch

from genai_fast import autotune, backends
from genai_fast.kernels.causal_attention import reference
from genai_fast.kernels.causal_attention.layout import empty_alike
from genai_fast.ops import attention_peers as peers


def _own(*arguments):
    out, lse = reference.causal_attention(*arguments)
    return out.to(arguments[0].dtype), lse.float()


def _own_backward(*arguments):
    return tuple(x.to(arguments[0].dtype) for x in reference.causal_attention_backward(*arguments))


def _settings(q, k, **changed):
    given = dict(starts_q=None, starts_k=None, most_q=q.size(2), most_k=k.size(2), seed=None, scale=0.25, window=0,
                 softcap=0.0, causal=True, share=0.0, offset=0) | changed  # fmt: skip
    return tuple(given.values())


def _heads(*sizes, dtype=torch.bfloat16, device="cpu"):
    return torch.randn(*sizes, device=device, dtype=dtype)


@pytest.fixture(autouse=True)
def calls(monkeypatch, tmp_path):
    """The names of the peers that were called, forward and backward; times by `seconds`."""
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "0")
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path))
    autotune.forget()
    autotune._warn_once.cache_clear()
    called = []

    def forward(name, q, k, v, causal, scale):
        called.append(name)
        return _own(q, k, v, *_settings(q, k, causal=causal, scale=scale))

    def backward(name, grad_out, q, k, v, out, lse, causal, scale):
        called.append(f"{name} backward")
        return _own_backward(grad_out, None, q, k, v, out, lse, *_settings(q, k, causal=causal, scale=scale))

    own = {"causal_attention": _own, "causal_attention_backward": _own_backward}
    monkeypatch.setattr(backends, "implementation", lambda name, backend: own[name])
    monkeypatch.setattr(peers, "_on_gpu", lambda x: True)
    monkeypatch.setattr(peers, "_available", lambda name, *plain: True)
    monkeypatch.setattr(peers, "forward", forward)
    monkeypatch.setattr(peers, "backward", backward)
    yield called
    autotune.forget()


@pytest.fixture
def seconds(monkeypatch):
    """What each takes; that of peers is found by what the timed call calls."""
    times = {"kernel": 2.0, "cudnn": 1.0, "flash": 3.0}
    ran = []
    made_up = peers._MadeUp._call

    def call(self, name):
        ran.append(name)
        return made_up(self, name)

    def clock(device, timed):
        timed()
        return times[ran[-1]]

    monkeypatch.setattr(peers._MadeUp, "_call", call)
    monkeypatch.setattr(autotune, "_clock", clock)
    return times


def test_the_fastest_serves_forward_and_backward(calls, seconds):
    q, k, v = (_heads(2, 2, 16, 8).requires_grad_() for _ in range(3))
    heard = {}
    with peers.heard(heard.__setitem__):
        out, lse = peers.causal_attention(_own, q, k, v, *_settings(q, k))
    del calls[:]
    out, lse = peers.causal_attention(_own, q, k, v, *_settings(q, k))
    grads = peers.causal_attention_backward(_own_backward, out, None, q, k, v, out, lse, *_settings(q, k))
    assert calls == ["cudnn", "cudnn backward"] and [g.shape for g in grads] == [x.shape for x in (q, k, v)]
    ((text, choice),) = heard.items()
    assert "2x2x16x8" in text and choice.name == "cudnn" and set(choice.microseconds) == {"kernel", "cudnn", "flash"}


def test_a_gradient_of_lse_and_few_queries_are_ours(calls, seconds):
    q, k, v = (_heads(1, 2, 16, 8).requires_grad_() for _ in range(3))
    out, lse = peers.causal_attention(_own, q, k, v, *_settings(q, k))
    del calls[:]
    peers.causal_attention_backward(_own_backward, out, lse, q, k, v, out, lse, *_settings(q, k))
    peers.causal_attention(_own, q[:, :, :8], k[:, :, :8], v[:, :, :8], *_settings(q[:, :, :8], k[:, :, :8]))
    assert calls == []


@pytest.mark.parametrize("changed", [dict(window=4), dict(softcap=2.0), dict(share=0.5), dict(scale=-1.0)], ids=str)
def test_what_peers_cannot_do_stays_ours(calls, seconds, changed):
    q, k, v = (_heads(1, 2, 16, 8) for _ in range(3))
    settings = _settings(q, k, **changed)
    assert not peers._may_be_served((q, k, v, True, changed.get("scale", 0.25)), (q, k, v, *settings))


@pytest.mark.parametrize(
    ("keys", "channels", "dtype"), [(32, 8, torch.bfloat16), (16, 12, torch.float16), (16, 8, torch.float32)], ids=str
)
def test_shapes_and_types_that_stay_ours(calls, keys, channels, dtype):
    q, k = _heads(1, 2, 16, channels, dtype=dtype), _heads(1, 2, keys, channels, dtype=dtype)
    assert not peers._may_be_served((q, k, k, True, 0.25), (q, k, k, *_settings(q, k)))


def test_pinned_is_ours(calls, seconds, monkeypatch):
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")
    q, k, v = (_heads(1, 2, 16, 8) for _ in range(3))
    peers.causal_attention(_own, q, k, v, *_settings(q, k))
    assert calls == []


def test_a_peer_with_other_results_is_left_out_and_named(calls, seconds, monkeypatch):
    right = peers.forward

    def wrong(name, *arguments):
        out, lse = right(name, *arguments)
        return (out, lse + 1.0) if name == "cudnn" else (out, lse)

    monkeypatch.setattr(peers, "forward", wrong)
    q, k, v = (_heads(1, 2, 16, 8) for _ in range(3))
    with pytest.warns(autotune.AutotuneWarning, match="cudnn fails and is skipped.*as our kernels give"):
        peers.causal_attention(_own, q, k, v, *_settings(q, k))
    (choice,) = autotune.chosen(q.device).values()
    assert choice.name == "kernel" and set(choice.microseconds) == {"kernel", "flash"}


def test_what_was_taken_away_makes_new_plans(calls):
    before = autotune.standing()
    autotune.forget()
    assert autotune.standing() != before


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_peers_are_called_as_pytorch_declares_them(monkeypatch, name, tokens_first):
    """On meta tensors, which have shapes alone: arguments, and results that lie as our kernels' do."""
    monkeypatch.undo()
    q = _heads(2, 32, 4, 8, device="meta").transpose(1, 2) if tokens_first else _heads(2, 4, 32, 8, device="meta")
    out, lse = peers.forward(name, q, q, q, True, 0.5)
    assert lse.shape == q.shape[:3] and lse.is_contiguous() and lse.dtype is torch.float32
    grads = peers.backward(name, out, q, q, q, out, lse, True, 0.5)
    for x in (out, *grads):
        assert x.shape == q.shape and x.stride() == empty_alike(q).stride()


def test_a_backend_that_was_asked_for_has_no_peers(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda name, forced, device, dtype: ("triton", ""))
    select = backends.select.__wrapped__
    monkeypatch.setattr(backends, "implementation", lambda name, backend: _own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select("causal_attention", "triton", "cuda", torch.bfloat16) is _own
        served = select("causal_attention", "", "cuda", torch.bfloat16)
    assert served.func is peers.causal_attention and served.args == (_own,)
