"""What the C++ kernels check for themselves: places that come from data, sizes of 0, memory that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.backends import select, unavailable
from genai_fast.kernels.common.extension import cpu_kernels

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(bool(unavailable("cpu", "cpu")), reason="no C++ extension")
LIBRARY = torch.ops.genai_fast


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with use_backend("cpu"):
        yield


def heads(count=3, tokens=6, batch=1):
    return [torch.randn(batch, 2, tokens, 8) for _ in range(count)]


def attend(q, k, v, starts_q, starts_k, window=0, causal=True):
    return LIBRARY.causal_attention(q, k, v, starts_q, starts_k, 6, 6, None, 0.35, window, 0.0, causal, 0.0, 0, "cpu")


WRONG_STARTS = {
    "beyond": [0, 900000, 6],
    "negative": [-4, 2, 6],
    "not_first": [1, 2, 6],
    "too_long": [0, 2, 9],
    "too_short": [0, 2, 4],
    "falling": [0, 4, 2, 6],
    "one": [0],
}


@pytest.mark.parametrize("place", ["q", "k"])
@pytest.mark.parametrize("name", WRONG_STARTS)
def test_packed_sequences_must_cover_the_rows(name, place):
    """Compiled code sees no values, and torch.ops.genai_fast is open to all: the kernel looks itself."""
    q, k, v = heads()
    wrong = torch.tensor(WRONG_STARTS[name], dtype=torch.int32)
    right = torch.linspace(0, 6, len(wrong)).int() if len(wrong) > 1 else wrong
    starts = (wrong, right) if place == "q" else (right, wrong)
    if name == "one":
        place = "q"  # both are wrong, and q comes first
    message = rf"causal_attention: cu_seqlens_{place}: expected .* for 6 packed rows, got -?\d+ at \d"
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, *starts)
    compiled = torch.compile(
        lambda *x: ops.causal_attention(*x[:3], cu_seqlens_q=x[3], cu_seqlens_k=x[4]), backend="eager"
    )
    with pytest.raises(ValueError, match=message):
        compiled(q, k, v, *starts)
    lse = torch.zeros(1, 2, 6)
    with pytest.raises(ValueError, match=message.replace("attention", "attention_backward", 1)):
        settings = (6, 6, None, 0.35, 0, 0.0, True, 0.0, 0, "cpu")
        LIBRARY.causal_attention_backward(q, None, q, k, v, q, lse, *starts, *settings)


def test_starts_that_wrap_in_int32_are_refused():
    q, k, v = heads()
    starts = torch.tensor([0, 2**32 + 3, 6])
    with pytest.raises(ValueError, match="cu_seqlens_q: expected"):
        attend(q, k, v, starts, starts)


@pytest.mark.parametrize("batch, starts", [(2, [0, 6]), (1, [[0, 6]]), (1, [])])
def test_packed_sequences_are_a_batch_of_one_and_a_vector(batch, starts):
    starts = torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected beginnings"):
        attend(*heads(batch=batch), starts, starts)


def test_right_starts_are_served():
    q, k, v = heads()
    starts = torch.tensor([0, 2, 2, 6])
    out, _ = attend(q, k, v, starts, starts)
    for first, last in ((0, 2), (2, 6)):
        alone, _ = attend(*(x[:, :, first:last] for x in (q, k, v)), None, None)
        assert torch.equal(out[:, :, first:last], alone)
    empty = [x[:, :, :0] for x in (q, k, v)]
    assert attend(*empty, torch.tensor([0]), torch.tensor([0]))[0].shape == (1, 2, 0, 8)


def backward(q, k, v, **changed):
    out, lse = attend(q, k, v, None, None)
    given = {"grad_out": torch.ones_like(out), "grad_lse": None, "out": out, "lse": lse, **changed}
    return LIBRARY.causal_attention_backward(
        given["grad_out"], given["grad_lse"], q, k, v, given["out"], given["lse"], None, None, 6, 6, None, 0.35, 0,
        0.0, True, 0.0, 0, "cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape"), [("grad_lse", (1,)), ("grad_lse", (1, 2, 5)), ("out", (1, 2, 6, 8)), ("lse", (1, 1, 6))]
)
def test_what_belongs_to_rows_of_q_must_fit(name, shape):
    q, k, v = heads()
    dtype = torch.float16 if name == "out" else torch.float32
    with pytest.raises(ValueError, match="expected a gradient and a result of q's"):
        backward(q, k, v, **{name: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [6, 2**40, 2**62, 2**63 - 1])
def test_a_window_beyond_all_keys_is_none(window, causal):
    """Differences of positions and a window must not overflow."""
    q, k, v = heads()
    found, right = (ops.causal_attention(q, k, v, window=w, causal=causal) for w in (window, None))
    assert torch.equal(found, right)
    cache = [torch.randn(1, 2, 9, 8) for _ in range(2)]
    lengths = torch.tensor([5])
    found, right = (ops.decode_attention(q[:, :, :1], *cache, lengths, window=w) for w in (window, None))
    assert torch.equal(found, right)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match=r"causal_attention: window: expected at least 0.* got -1"):
        attend(*heads(), None, None, window=-1)


def test_lengths_that_wrap_in_int32_have_no_room():
    q, k_cache, v_cache = torch.randn(3, 2, 1, 8), *(torch.randn(3, 2, 9, 8) for _ in range(2))
    lengths = torch.tensor([2**32 + 3, -(2**32) + 3, 3])
    out, _ = LIBRARY.decode_attention(q, k_cache, v_cache, lengths, None, None, 0.35, 0, 0.0, "cpu")
    assert out.isnan().all(-1).all(-1).all(-1).tolist() == [True, True, False]


def test_gpt_decode_without_heads():
    layer = ((0,), (0,), (0, 0), (0,), (0, 0), (0,), (0,), (0,), (16, 0), (16,), (0, 16), (0,))
    weights = [torch.randn(s) for s in ((11, 0), (6, 0), *layer, (0,), (0,), (11, 0))]
    for channels in ((0, 4), (3, 0), (0, 0)):
        cache = torch.zeros(1, 2, 1, channels[0], 6, channels[1])
        with pytest.raises(ValueError, match="at least 1 head and 1 channel"):
            ops.gpt_decode(torch.tensor([[1]]), cache, 0, weights)


@pytest.mark.parametrize("value", [-1, 11, 2**40])
def test_gpt_decode_looks_at_its_ids(value):
    from genai_fast.models import GPT

    model = GPT(11, 6, 1, 2, 8)
    weights = [p.detach() for p in model.state_dict().values()]
    weights = [*weights[:-1], weights[0]] if len(weights) == 17 else [*weights, weights[0]]
    cache = torch.zeros(1, 2, 1, 2, 6, 4)
    ids = torch.tensor([[1, value]])
    with pytest.raises(ValueError, match=rf"gpt_decode: ids: expected 0 to 10, got {value}"):
        LIBRARY.gpt_decode(cache, ids, 0, weights, [], 1e-5, False, "cpu")


@pytest.mark.parametrize("name", ["input", "weight"])
@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_gradients_of_a_convolution_without_pixels(name, size):
    """An output_padding that reaches as far as the stride makes a result of no pixels."""
    grad_y, weight = torch.randn(2, 3, *(1 if n == 0 else 9 for n in size)), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="expected at least one channel and pixel each"):
        if name == "input":
            LIBRARY.conv_transpose_grad_input(grad_y, weight, list(size), [2, 2], [0, 0], "cpu")
        else:
            x = torch.randn(2, 4, *size)
            LIBRARY.conv_transpose_grad_weight(grad_y, x, [3, 3], [2, 2], [0, 0], False, "cpu")


def test_statistics_take_both_running_vectors_in_any_dtype():
    x = torch.randn(4, 3, 5)
    right = torch.zeros(3), torch.ones(3)
    LIBRARY.batch_norm_statistics(x, *right, 0.1, 1e-5, "cpu")
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        found = [r.to(dtype) for r, dtype in zip((torch.zeros(3), torch.ones(3)), dtypes, strict=True)]
        LIBRARY.batch_norm_statistics(x, *found, 0.1, 1e-5, "cpu")
        for ours, wanted, dtype in zip(found, right, dtypes, strict=True):
            assert torch.equal(ours, wanted.to(dtype))
    with pytest.raises(ValueError, match="batch_norm_statistics: running_mean and running_var: expected both"):
        LIBRARY.batch_norm_statistics(x, torch.zeros(3), None, 0.1, 1e-5, "cpu")


def test_cross_entropy_without_classes():
    with pytest.raises(ValueError, match="at least one class"):
        LIBRARY.cross_entropy(
            torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), None, -100, 0.0, 0.0, 0.0, "mean", False, "cpu"
        )


ZERO = {
    "weight": ("layer_norm", lambda x, zero: (x, None, zero, None, False, 1e-5, "gemma")),
    "residual": ("layer_norm", lambda x, zero: (x, zero.expand(3, 8), None, None, False, 1e-5, "gemma")),
    "input": ("act_dropout", lambda x, zero: (zero, None, 0.0, 0, "relu", 0.0)),
    "bias": ("gated_act", lambda x, zero: (x, None, zero, "silu", 1.0, 1.0)),
    "scale": (
        "batch_norm_act_apply",
        lambda x, zero: (x, zero, None, None, zero + 1, zero + 1, None, False, "relu", 0.0),
    ),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_tensor_without_memory_is_not_taken_for_none(name):
    """Called as small tensors are, past the dispatcher, which would fill it."""
    op, arguments = ZERO[name]
    with pytest.raises(ValueError, match="expected a tensor with memory of its own"):
        select(op, "cpu", "cpu", torch.float32)(*arguments(torch.randn(3, 8), torch._efficientzerotensor((8,))))


def test_an_error_names_the_kernel():
    kernel = cpu_kernels()[0]["philox_words"]
    with pytest.raises(TypeError, match="philox_words: expected 4 arguments, got 1"):
        kernel(0)


MEMORY = """
import re, resource, torch
from genai_fast import ops
torch.set_num_threads(2)
f, r = torch.randn, dict(requires_grad=True)
kv = [f(1, 1, 1 << 16, 64, **r) for _ in range(2)]
q, wide, many = f(1, 1, 4, 64, **r), f(2, 1 << 22, dtype=torch.bfloat16, **r), f(1 << 21, 1, **r)
tables = [f(4, 1 << 20) for _ in range(2)]
gru = [f(2, 2, 64, **r), f(2, 1024, **r), f(3072, 64, **r), f(3072, 1024, **r)]
up = [f(2, 512, 8, 8, **r), f(512, 3, 4, 4, **r)]
target = torch.zeros(1 << 22, dtype=torch.int64)
calls = {
    "causal_attention": lambda: ops.causal_attention(q, *kv, causal=False),
    "gru": lambda: ops.gru(*gru)[0],
    "layer_norm": lambda: ops.layer_norm(wide),
    "cross_entropy": lambda: ops.cross_entropy(f(1 << 22, 1, **r), target),
    "rotary": lambda: ops.rotary(f(1, 1, 2, 1 << 21, **r), *tables),
    "bias_act": lambda: ops.bias_act(f(2, 1 << 22, **r), f(1 << 22, **r)),
    "batch_norm_act": lambda: ops.batch_norm_act(f(2, 1 << 21, **r)),
    "gated_act": lambda: ops.swiglu(f(2, 1 << 22, **r), None, f(1 << 22, **r)),
    "vae_loss": lambda: ops.vae_loss(many, many.detach().sigmoid(), many, many)[0],
    "reparameterize": lambda: ops.reparameterize_kl(f(1, 1 << 23, **r), f(1, 1 << 23, **r))[1],
    "conv_transpose": lambda: ops.conv_transpose2d(*up),
}
for name, call in calls.items():
    call().float().sum().backward()  # threads are there
    named = set()
    for extra in sorted({int(1.3**k) for k in range(25)}):
        held = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (held + (extra << 20), resource.RLIM_INFINITY))
        try:
            call().float().sum().backward()
            break
        except (MemoryError, RuntimeError) as error:
            said = f"{type(error).__name__} {error}"
            if "numbers, got none" in said: named.add(said.split(":")[0])
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else: print(name, "was never served")
    print(name, *sorted(named), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and RLIMIT_AS")
def test_memory_that_cannot_be_had_raises():
    """In a process of its own whose limit rises until each op passes, forward and backward: never a signal."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "GENAI_FAST_DETERMINISTIC": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "never" not in done.stdout
    raised = {word for line in done.stdout.splitlines() for word in line.split()[1:]} - {"MemoryError"}
    # Of some the window between the results' memory and the kernel's own is narrower than a step of the limit.
    assert {"causal_attention_backward", "gru"} <= raised and len(raised) >= 6, done.stdout


def test_odd_calls_are_refused_or_served():
    """In a process of its own: what is wrong there ends it."""
    command = [sys.executable, str(ROOT / "tests" / "native_fuzz.py"), "--count", "500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = "\n".join(done.stdout.splitlines()[-3:])
    assert done.returncode == 0, f"{done.returncode}: {last}\n{done.stderr[-3000:]}"
    assert "50 odd shapes, 500 changed calls" in last
