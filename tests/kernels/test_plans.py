"""Plans: on the CPU here, on a GPU in another process, since one in which Triton interprets cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genai_fast import ops
from genai_fast.kernels.common import plans, recorder
from genai_fast.kernels.common.spec import Tensors
from genai_fast.registry import OPS

FOLDER = Path(__file__).resolve().parent
# One whole plan each, and those whose parts alone have plans (targets are looked at).
SERVED = [
    "layer_norm", "rms_norm", "reparameterize", "reparameterize_kl", "vae_loss", "batch_norm_act", "bias_act",
    "act_dropout", "gated_act", "rotary", "cross_entropy", "causal_attention", "decode_attention",
]  # fmt: skip


def test_compiled_plans():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, str(FOLDER / "compiled_plans.py")], cwd=FOLDER.parents[1], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def _results(op, inputs):
    """Outputs and gradients."""
    outputs = getattr(ops, op.name)(**inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    wanted = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    kept = [y for y in outputs if y.requires_grad]
    grads = torch.autograd.grad(kept, wanted, [torch.ones_like(y) for y in kept], allow_unused=True) if kept else ()
    return [x.detach().clone() for x in (*outputs, *grads) if x is not None]


@pytest.mark.parametrize("name", SERVED)
def test_a_plan_on_the_cpu_gives_the_same_bits(name):
    op, sets = OPS[name], []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        sets.append(op.cases[0].inputs(Tensors(torch.float32, generator=generator)))
    with plans.unused():
        expected = [_results(op, inputs) for inputs in sets]
    for inputs, right in zip(sets, expected, strict=True):
        for got, wanted in zip(_results(op, inputs), right, strict=True):
            assert torch.equal(got, wanted)


def test_a_kernel_gets_the_threads_of_its_call():
    x, seen, threads = torch.zeros(4), [], [3]

    def kernel(*arguments):
        seen.append(arguments)

    def get():
        return threads[0]

    with recorder.recording(recorder.Recorder({"a[0]": x})) as watch:
        y = torch.empty(4)
        watch.called(kernel, (x.data_ptr(), y.data_ptr(), 7, 0.5), get)
    plan = watch.plan(y)
    threads[0], other = 2, torch.zeros(4)
    made = plan.run((other,), None)
    assert seen == [(other.data_ptr(), made.data_ptr(), 7, 0.5, 2)]


def _inside(block, x):
    with block:
        return x.sum()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: x.data_ptr() + 8, "an address is computed with"),
        (lambda x: x.data_ptr() == 0, "an address is computed with"),
        (lambda x: x.sum().item(), "item may tell values"),
        (lambda x: bool(x.sum() > 0), "may make what values say"),
        (lambda x: x[x > 0], "may make what values say"),
        (lambda x: x.normal_(), "normal_ may make what values say"),
        (lambda x: recorder.watching().called(print, (1 << 40,), print), "the address of what is no tensor"),
        (lambda x: recorder.watching().step(abs, (torch.Tensor(),), None), "a tensor comes from elsewhere"),
        (lambda x: _inside(torch.autocast("cpu", torch.bfloat16), x), "autocast is switched on or off"),
        (lambda x: _inside(torch.no_grad(), x), "gradients are switched on or off"),
        (lambda x: None, "nothing is launched"),
    ],
)
def test_what_cannot_be_done_again_makes_no_plan(body, reason):
    x = torch.ones(4, requires_grad=reason.startswith("gradients"))
    with recorder.recording(recorder.Recorder({"a[0]": x})) as watch:
        body(x)
    assert watch.plan(None) is None and reason in watch.refusal


def test_a_plan_holds_while_what_it_read_is_the_same():
    x, setting = torch.ones(4), ["a"]
    with recorder.recording(recorder.Recorder({"a[0]": x})) as watch:
        assert recorder.reads(lambda: setting[0]) == "a"
        watch.called(lambda *arguments: None, (x.data_ptr(),), lambda: 1)
    plan = watch.plan(None)
    assert plan.holds()
    setting[0] = "b"
    assert not plan.holds()


def test_what_a_signature_does_not_tell_is_checked_in_planned_calls():
    q, k, v = (torch.randn(2, 4, 1, 16) for _ in range(3))
    caches, more = torch.zeros(2, 2, 4, 8, 16), torch.zeros(2, 4, 8, 16)
    lengths = torch.zeros(2, dtype=torch.int32)
    for _ in range(3):
        ops.decode_attention(q, *caches, lengths, k, v)
    assert torch.equal(caches[0][:, :, 0], k[:, :, 0]) and torch.equal(caches[1][:, :, 0], v[:, :, 0])
    version = caches._version
    lengths.fill_(7)
    ops.decode_attention(q, *caches, lengths, k, v)
    assert caches._version > version and torch.equal(caches[1][:, :, 7], v[:, :, 0])
    lengths[1] = 8
    with pytest.raises(ValueError, match=r"cache_seqlens: expected 0 to 7.*got 8"):
        ops.decode_attention(q, *caches, lengths, k, v)
    lengths[1] = -1
    with pytest.raises(ValueError, match=r"cache_seqlens: expected 0 to 7.*got -1"):
        ops.decode_attention(q, *caches, lengths, k, v)
    lengths.zero_()
    with pytest.raises(ValueError, match="v_cache: expected other memory"):
        ops.decode_attention(q, more, more, lengths, k, v)
    assert not more.any()
