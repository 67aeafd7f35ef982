"""What generation costs: a batch of texts token by token, of images or sounds at once; latency and throughput."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast import cpu
from genai_fast.contract import image_traits, offers
from genai_fast.errors import UsageError
from genai_fast.models.common.generation import decoder_for
from genai_fast.models.common.protocol import Draws, DrawsWaves, WritesOn
from genai_fast.models.registry import RECIPES
from genai_fast.profiling import machine
from genai_fast.profiling.figures import percentile
from genai_fast.profiling.systems import of_recipe
from genai_fast.runs.run import open_run

BATCHES = (1, 8, 32)
_LEAST = 3  # calls of each batch on the clock
_WAVE = 800  # samples of a sound
_BLOCK = 256  # tokens of a text whose model has no limit


def profile(name: str, device: torch.device, batches: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """{"model", "what", "unit", "device", "environment", "tune_cpu", "batches": {batch: figures}}.

    Of a batch: "first_seconds" {"p50", "p95"} until the first token, sound or image is there, "seconds" {"p50", "p95"}
    of each further one ("each" says of what), "per_second" of all of the batch together.

    Args:
        name: a recipe, whose weights are drawn, or the folder of a run.
        seconds: on the clock, for each batch.

    Raises UsageError: there is no such model, or it generates nothing by itself.
    """
    model = _model(name).to(device).eval()
    measure, unit, each, what = _kind(name, model)
    found = {}
    for batch in batches:
        calls = measure(batch)
        next(calls)  # whatever is made once
        found[batch] = _clocked(calls, batch, seconds, device)
    return {
        "model": name, "what": what, "unit": unit, "each": each, "device": device.type,
        "environment": machine.environment(device.type), "tune_cpu": str(cpu.active() or ""), "batches": found,
    }  # fmt: skip


def as_text(found: dict[str, Any]) -> str:
    """A line a batch."""
    where, each = found["environment"], found["each"]
    threads = "" if found["device"] == "cuda" else f" (threads: {where['threads']})"
    lines = [f"{found['model']}: {found['what']}", f"{where['device']}{threads}, torch {where['torch']}"]
    if found["tune_cpu"]:
        lines.append(f"tune_cpu: {found['tune_cpu']}")
    heads = ["batch", f"{found['unit']}/s", "first ms p50", "p95"]
    rows = [heads + ([f"{each} ms p50", "p95"] if each else [])]
    for batch, one in found["batches"].items():
        times = [one["first_seconds"]] + ([one["seconds"]] if each else [])
        cells = [f"{1e3 * part[key]:.4g}" for part in times for key in ("p50", "p95")]
        rows.append([str(batch), f"{one['per_second']:,.4g}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", *table])


# A call of a batch: how many of each were made, and the seconds of the first and of all others.
Call = tuple[int, float, list[float]]


def _clocked(calls: Iterator[Call], batch: int, seconds: float, device: torch.device) -> dict[str, Any]:
    made, first, others, start = 0, [], [], time.perf_counter()
    while len(first) < _LEAST or time.perf_counter() < start + seconds:
        count, one, rest = next(calls)
        made += count
        first.append(one)
        others += rest
    wall = time.perf_counter() - start
    return {
        "per_second": batch * made / wall, "calls": len(first), "first_seconds": _spread(first),
        "seconds": _spread(others) if others else None,
    }  # fmt: skip


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(seconds), "p95": percentile(seconds, 0.95)}


def _model(name: str) -> nn.Module:
    if name in RECIPES:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return of_recipe(name).model()
    if not Path(name).is_dir():
        raise UsageError(f"MODEL: with --generate expected a recipe or the folder of a run, got {name!r}")
    return open_run(Path(name)).model


def _kind(name: str, model: nn.Module) -> tuple[Callable[[int], Iterator[Call]], str, str, str]:
    """What makes a batch, the unit, what comes after the first, and what is made, in words."""
    if offers(model, WritesOn):
        block = getattr(model, "block", None) or _BLOCK
        prompt = max(block // 2, 1)
        what = f"{block - prompt} tokens after a prompt of {prompt}, the likeliest each"
        return lambda batch: _texts(model, batch, prompt, block - prompt), "tokens", "token", what
    if offers(model, DrawsWaves):
        return lambda batch: _at_once(lambda: _waves(model, batch), _WAVE), "samples", "", f"sounds of {_WAVE} samples"
    if offers(model, Draws) and not getattr(model, "targets", ()):
        labels = "" if not image_traits(model).classes else ", of drawn labels"
        return lambda batch: _at_once(lambda: model.sample(batch, seed=0), 1), "images", "", f"images of noise{labels}"
    raise UsageError(f"--generate: {name}: expected a model that writes on, or draws images or sounds of noise")


def _texts(model: Any, batch: int, prompt: int, tokens: int) -> Iterator[Call]:
    decoder = decoder_for(model, batch)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary, (batch, prompt), generator=generator)
    while True:
        start = time.perf_counter()
        now = decoder.prefill(ids).argmax(-1).cpu()
        last = time.perf_counter()
        first, others = last - start, []
        for _ in range(tokens - 1):
            now = decoder.step(now).argmax(-1).cpu()  # which waits for a device
            others.append(time.perf_counter() - last)
            last = time.perf_counter()
        yield tokens, first, others


def _waves(model: Any, batch: int) -> torch.Tensor:
    classes = image_traits(model).classes
    labels = torch.arange(batch) % classes if classes else None
    return model.draw_codes(batch, _WAVE, labels, seed=0)


def _at_once(draw: Callable[[], torch.Tensor], count: int) -> Iterator[Call]:
    while True:
        start = time.perf_counter()
        with torch.no_grad():
            draw().cpu()
        yield count, time.perf_counter() - start, []
