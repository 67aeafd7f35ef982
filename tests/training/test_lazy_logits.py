"""Logits on request: losses, gradients and all that is done with logits are those of a plain head."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close, calls_of
from torch import nn

from genai_fast import lazy_logits, ops, unfuse
from genai_fast.lazy import LazyLogits

CLASSES = 50


def _pair(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    plain = nn.Linear(16, CLASSES, bias=bias).to(dtype)
    lazy = lazy_logits(copy.deepcopy(plain))
    return plain, lazy, torch.randn(3, 7, 16).to(dtype), torch.randint(CLASSES, (3, 7))


def _gradients(head, x, loss_of):
    x = x.detach().requires_grad_()
    loss = loss_of(head(x))
    loss.backward()
    found = loss, x.grad, *(p.grad for p in head.parameters())
    head.zero_grad()
    return found


def _shifted(logits, target):
    """As transformers did before, and as many do."""
    shift_logits = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shift_logits.view(-1, CLASSES), target[..., 1:].reshape(-1))


def _summed(logits, target):
    """As transformers does under gradient accumulation."""
    return F.cross_entropy(logits.float().view(-1, CLASSES), target.view(-1), ignore_index=3, reduction="sum") / 5


def _module(logits, target):
    return nn.CrossEntropyLoss(label_smoothing=0.1)(logits.reshape(-1, CLASSES), target.flatten())


def _masked(logits, target):
    return F.cross_entropy(input=logits[target > 20], target=target[target > 20])


def _single(logits, target):
    return (F.cross_entropy(logits[1], target[1], reduction="none") * torch.arange(7.0)).sum()


LOSSES = (_shifted, _summed, _module, _masked, _single)


@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_losses_without_logits(loss_of, dtype):
    plain, lazy, x, target = _pair(dtype)
    expected = _gradients(plain, x, lambda logits: loss_of(logits, target))
    seen = []
    with calls_of("linear_cross_entropy") as made:
        found = _gradients(lazy, x, lambda logits: loss_of(seen.append(logits) or logits, target))
    assert len(made) == 1 and type(seen[0]) is LazyLogits and seen[0].made is None
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5 if dtype is torch.float32 else 3e-2)


OTHERS = {
    "softcap": lambda logits, target: F.cross_entropy(
        (30 * torch.tanh(logits / 30)).view(-1, CLASSES), target.view(-1)
    ),
    "weights": lambda logits, target: F.cross_entropy(
        logits.view(-1, CLASSES), target.view(-1), torch.linspace(0.5, 1, CLASSES)
    ),
    "probabilities": lambda logits, target: F.cross_entropy(logits[0], torch.softmax(torch.ones(7, CLASSES), -1)),
    "classes_second": lambda logits, target: F.cross_entropy(logits.transpose(1, 2), target),
    "log_softmax": lambda logits, target: -torch.log_softmax(logits, -1)[..., 3].mean(),
    "own_function": lambda logits, target: ops.cross_entropy(logits, target),
    "some_classes": lambda logits, target: logits[..., :7].square().mean() + logits[0, 0, 0],
    "two": lambda logits, target: (logits.log_softmax(-1) * logits.detach().softmax(-1)).sum(),
    "in_place": lambda logits, target: logits.mul_(2.0).square().mean(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_has_logits_with_their_gradient(name):
    plain, lazy, x, target = _pair()
    expected = _gradients(plain, x, lambda logits: OTHERS[name](logits, target))
    for a, b in zip(_gradients(lazy, x, lambda logits: OTHERS[name](logits, target)), expected, strict=True):
        assert_close(a, b, 1e-5)


def test_logits_after_the_loss():
    plain, lazy, x, target = _pair()
    logits, expected = lazy(x), plain(x)
    loss = F.cross_entropy(logits.view(-1, CLASSES), target.view(-1))
    assert logits.made is None and logits.shape == expected.shape and logits.requires_grad
    assert_close(logits.detach(), expected)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    (loss + logits.square().mean()).backward()
    (F.cross_entropy(expected.view(-1, CLASSES), target.view(-1)) + expected.square().mean()).backward()
    assert_close(lazy.weight.grad, plain.weight.grad)


def test_a_look_after_the_step_is_refused():
    _, lazy, x, target = _pair()
    optimizer = torch.optim.SGD(lazy.parameters(), 0.1)
    for look_first in (True, False):
        logits = lazy(x)
        F.cross_entropy(logits.view(-1, CLASSES), target.view(-1)).backward()
        before = logits.detach().clone() if look_first else None
        optimizer.step()
        if look_first:
            assert torch.equal(logits.detach(), before)
        else:
            with pytest.raises(RuntimeError, match="changed in place since; look at the logits before"):
                logits.argmax(-1)


def test_a_function_of_autograd_gets_the_gradient_through():
    """It sees neither torch's functions nor their modes."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2.0

        @staticmethod
        def backward(ctx, grad):
            return grad * 2.0

    plain, lazy, x, _ = _pair()
    expected = _gradients(plain, x, lambda logits: Double.apply(logits).square().mean())
    for a, b in zip(_gradients(lazy, x, lambda logits: Double.apply(logits).square().mean()), expected, strict=True):
        assert_close(a, b)


def test_under_autocast():
    plain, lazy, x, target = _pair()
    results = []
    for head in (plain, lazy):
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(x.requires_grad_())
        assert logits.dtype is torch.bfloat16
        loss = F.cross_entropy(logits.float().view(-1, CLASSES), target.view(-1))
        loss.backward()
        results.append((loss, logits.detach().float(), head.weight.grad))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 2e-2)


def test_where_nothing_is_lazy():
    plain, lazy, x, _ = _pair()
    with torch.no_grad():
        assert type(lazy(x)) is torch.Tensor
    assert type(lazy.eval()(x)) is torch.Tensor
    lazy.train()
    assert type(torch.compile(lazy, backend="eager", fullgraph=True)(x)) is torch.Tensor
    assert_close(torch.func.grad(lambda x: lazy(x).sum())(x), torch.func.grad(lambda x: plain(x).sum())(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lazy(x[..., :5])


def test_it_is_the_same_module_and_taken_back():
    plain, lazy, x, _ = _pair()
    assert isinstance(lazy, nn.Linear) and lazy_logits(lazy) is lazy
    assert type(pickle.loads(pickle.dumps(lazy))) is nn.Linear
    assert type(unfuse(lazy)) is nn.Linear and torch.equal(lazy(x), plain(x))


def test_hooks_see_logits():
    plain, lazy, x, _ = _pair()
    for head in (plain, lazy):
        head.register_forward_hook(lambda module, given, logits: logits + 1.0)
    assert_close(lazy(x), plain(x))


@pytest.mark.parametrize("model", (nn.ReLU(), nn.Sequential(nn.Linear(2, 2)), "a string", nn.Bilinear(2, 2, 2)))
def test_what_has_no_head_is_refused(model):
    with pytest.raises(TypeError, match=r"lazy_logits: model: expected an nn\.Linear.*got"):
        lazy_logits(model)


_STEP = """
import resource, sys
import torch
import transformers
from genai_fast import lazy_logits

settings = dict(vocab_size=1 << 17, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).train()
if sys.argv[1] == "lazy":
    lazy_logits(model)
tokens = torch.randint(1 << 17, (1, 512), generator=torch.Generator().manual_seed(1))
model(tokens[:, :8], labels=tokens[:, :8]).loss.backward()  # gradients and what is made once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = model(tokens, labels=tokens).loss
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, loss.item())
"""


def test_memory_of_the_loss_at_a_vocabulary_of_128k():
    """Peak memory of a training step above what the model has already: under a third of a plain head's."""
    pytest.importorskip("transformers", reason="pip install .[huggingface]")
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss is in other units")
    found = {}
    for kind in ("plain", "lazy"):
        done = subprocess.run([sys.executable, "-c", _STEP, kind], capture_output=True, text=True, check=True)
        found[kind] = tuple(map(float, done.stdout.split()))
    assert found["lazy"][0] < found["plain"][0] / 3, found
    assert found["lazy"][1] == pytest.approx(found["plain"][1], rel=1e-5)
