"""Figures of a GPT that writes, on the CPU: what is measured, what refused."""

import io
import json
import sys

import pytest
import torch

from bench.gpu_gate import decoding, processes, worker
from bench.gpu_gate.training import REDUCED
from genai_fast.profiling.loops import EAGER, FUSED

TINY = decoding.Model(1, 2, 16, 40, 24)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(decoding, "TOKENS", 4)
    monkeypatch.setattr(decoding.roofs, "share", lambda device, seconds, nbytes, flops: 0.5)
    monkeypatch.setitem(decoding.MEASURED, "tiny", TINY)


def test_a_process_measures_what_it_is_asked_for(monkeypatch, capsys, seconds):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(["nobody's", "tiny"])))
    monkeypatch.setattr(sys, "argv", ["worker", "decoding", "cpu", '{"rounds": 2, "compiled": false}'])
    assert worker.main() == 0
    messages = filter(None, map(processes.parsed, capsys.readouterr().out.splitlines()))
    refused, found = (message for message in messages if "run" in message)
    assert refused["failures"]["raised"].startswith("UsageError: nobody's: expected one of gpt2_bfloat16")
    assert "failures" not in found and list(found["variants"]) == [EAGER, FUSED]
    assert {name: v["wall_us"] for name, v in found["variants"].items()} == {
        name: round(t * 1e6, 2) for name, t in reversed(seconds.items())
    }
    ours = seconds[FUSED]
    assert found["ratio"] == {EAGER: round(seconds[EAGER] / ours, 3)}
    assert found["tokens_per_second"] == round(1 / ours, 1)
    # The layer's matrices and the head, and of the cache 14 tokens.
    read = 4 * (12 * 16 * 16 + 40 * 16 + 2 * 16 * (12 + 2 + 1))
    assert found["gigabytes_per_second"] == round(read / ours / 1e9, 2)


LLAMAS = [decoding.LlamaModel(2, 4, 16, 40, 24, dtype, 3, kv_heads=2) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("model", [TINY, decoding.Model(2, 2, 16, 40, 24, torch.bfloat16, 3), *LLAMAS], ids=str)
@torch.no_grad()
def test_every_loop_writes_the_same(model):
    """What torch.compile gets too, as it is."""
    loops = [decoding.fused(model, "cpu"), decoding.eager(model, "cpu")]
    weights, cache = model.state("cpu", model.dtype)
    model.call(model.prompt("cpu"), cache, 0, weights)
    static = model.static(weights, cache)
    for loop in loops:
        loop.begin()
    for place in range(model.held, model.block):
        ids = torch.arange(model.batch) + place
        ours, eager, compiled = *(loop.token(ids) for loop in loops), static(ids, torch.tensor([place]))
        limit = decoding.TOLERANCE[model.dtype] * eager.abs().max()
        assert (ours - eager).abs().max() <= limit and (compiled - eager).abs().max() <= limit
    assert decoding.red(model, "cpu") == ""


def test_no_figures_of_wrong_logits(monkeypatch):
    right = decoding.fused

    def off(model, device):
        loop = right(model, device)
        return loop._replace(token=lambda ids: loop.token(ids) * 1.01)

    monkeypatch.setattr(decoding, "fused", off)
    found = decoding.figures("tiny", "cpu", 1, False)
    assert "variants" not in found and "logits of token 1" in found["failures"]["numerics"]


def test_a_peer_that_cannot_be_compiled_is_skipped(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(decoding, "compiled", fails)
    found = decoding.figures("tiny", "cpu", 1)
    assert found["variants"][REDUCED] == {"skipped": "RuntimeError: no compiler"} and list(found["ratio"]) == [EAGER]
    monkeypatch.setattr(decoding, "eager", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        decoding.figures("tiny", "cpu", 1)
