"""What `genai-fast profile` does."""

import argparse
import contextlib
import difflib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from genai_fast import atomic_files
from genai_fast.cpu import tune_cpu
from genai_fast.errors import UsageError, require
from genai_fast.models.registry import RECIPES
from genai_fast.profiling import generation, loops, report, sweep
from genai_fast.profiling.figures import figures
from genai_fast.profiling.loops import COMPILE, LOOP, TUNED, Subject
from genai_fast.profiling.measure import Measurement, measure
from genai_fast.runs.run import device_of, new_folder

FILES = "profile.json, profile.txt, profile.png, trace-VARIANT.json (open it at ui.perfetto.dev)"


def run(options: argparse.Namespace) -> int:
    """Measure, print, and leave a folder."""
    if not 0 < options.seconds < math.inf:
        raise UsageError(f"--seconds: expected a number > 0, got {options.seconds:g}")
    batches = _batches(options.batch)
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        require(module, "train")  # now, not after the measurement
    if options.generate:
        return _run_generation(options, batches)
    subject, _ = _subject(options, batches[0])
    variants = _variants(options.compare, subject)
    out = new_folder(Path("."), f"profile-{subject.name}") if options.out is None else options.out
    own = ":" in options.model  # a recipe is measured as `genai-fast train` runs it
    with (
        contextlib.nullcontext() if own else tune_cpu(),
        _new(out) as folder,
        contextlib.redirect_stdout(sys.stderr),  # a loop's own words are not the report
    ):
        if len(batches) > 1:
            found = sweep.sweep(
                {batch: _profiled(options, batch, variants, folder, f"batch {batch}: ") for batch in batches}
            )
            shown = sweep
        else:
            found, shown = _profiled(options, batches[0], variants, folder), report
        text, data = shown.as_text(found), json.dumps(found, indent=1, allow_nan=False)
        (folder / "profile.txt").write_text(text + "\n", encoding="utf-8")
        (folder / "profile.json").write_text(data + "\n", encoding="utf-8")
        shown.draw(found, folder / "profile.png")
    print(data if options.json else f"{text}\n\n{out}: {FILES}")
    return 0


def _batches(text: str | None) -> list[int | None]:
    """Of --batch: one, or several to find out where throughput stops growing."""
    if text is None:
        return [None]
    try:
        found: list[int | None] = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--batch: expected a number, or several as 16,32,64, got {text!r}") from None
    if any(batch < 1 for batch in found) or len(set(found)) < len(found):
        raise UsageError(f"--batch: expected numbers from 1 on, each once, got {text}")
    return found


def _profiled(
    options: argparse.Namespace, batch: int | None, variants: list[str], folder: Path, where: str = ""
) -> dict[str, Any]:
    """The figures of one batch size."""
    subject, device = _subject(options, batch)
    if where:
        folder = folder / f"batch-{batch}"
        folder.mkdir()
    together = [name for name in variants if name != TUNED]
    measurement = measure(subject, together, options.seconds, device, folder, lambda text: _say(where + text))
    tuning = ""
    if TUNED in variants and not measurement.cuda:
        with tune_cpu() as tuned:  # it is of the whole process: the others have had their turns
            more = measure(subject, [TUNED], options.seconds, device, folder, lambda text: _say(where + text))
            measurement.variants += more.variants
            tuning = str(tuned)
    _check(subject, measurement)
    _say(f"{where}measuring the peak of matmuls on this machine")
    return {**figures(subject, measurement), "tuned": tuning}


def _run_generation(options: argparse.Namespace, batches: list[int | None]) -> int:
    unused = {"--compare": options.compare, "--data": options.data, "--precision": options.precision}
    if given := [flag for flag, value in unused.items() if value]:
        raise UsageError(f"{given[0]}: --generate has no use for it; remedy: omit it")
    device = device_of(options.device or "auto")
    sizes = generation.BATCHES if batches == [None] else tuple(batches)
    name = Path(options.model).name or options.model
    out = new_folder(Path("."), f"profile-{name}-generate") if options.out is None else options.out
    with tune_cpu(), _new(out) as folder:
        found = generation.profile(options.model, device, sizes, options.seconds)
        text, data = generation.as_text(found), json.dumps(found, indent=1, allow_nan=False)
        (folder / "profile.txt").write_text(text + "\n", encoding="utf-8")
        (folder / "profile.json").write_text(data + "\n", encoding="utf-8")
    print(data if options.json else f"{text}\n\n{out}: profile.json, profile.txt")
    return 0


def _subject(options: argparse.Namespace, batch: int | None) -> tuple[Subject, torch.device | None]:
    """What is profiled, and the device that it certainly uses."""
    name, bf16 = options.model, options.precision in ("bfloat16", "bf16")
    device = None if options.device is None else device_of(options.device)
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if ":" in name:
        if options.data:
            raise UsageError(f"--data: {name} has its own; remedy: omit it")
        return loops.own(name, device, batch, bf16, options.own), device
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"MODEL: expected {loops.names()}, got {name!r}{hint}")
    device = device or device_of("auto")
    precision = "bfloat16" if bf16 else "float32"
    return loops.recipe(name, device, batch, precision, options.data), device


def _variants(wanted: str | None, subject: Subject) -> list[str]:
    if wanted is None:
        return [name for name in subject.variants if name != COMPILE]
    variants = wanted.split(",")
    if unknown := [name for name in variants if name not in loops.VARIANTS]:
        raise UsageError(f"--compare: expected some of {','.join(loops.VARIANTS)}, got {unknown[0]!r}")
    if len(set(variants)) < len(variants):
        raise UsageError(f"--compare: expected each variant once, got {wanted}")
    if LOOP in subject.variants:
        raise UsageError(
            f"--compare: {subject.what} takes no `prepare`; remedy: give it that parameter and call"
            f" model = prepare(model) in it, once per network"
        )
    if variants == [TUNED]:
        raise UsageError("--compare: tuned: expected something to compare it with; remedy: --compare fused,tuned")
    if TUNED in variants and TUNED not in subject.variants:
        what = "on a GPU there is nothing to tune" if ":" in subject.what else "a recipe runs under tune_cpu already"
        raise UsageError(f"--compare: tuned: {what}; remedy: --compare eager,fused")
    return variants


@contextlib.contextmanager
def _new(out: Path) -> Any:
    """A folder to write into, which gets its name when all is written; nothing is left otherwise."""
    atomic_files.check_vacant(out)
    with atomic_files.whole(out) as folder:
        try:
            folder.mkdir()
        except OSError as error:
            raise UsageError(f"--out: {out}: expected a folder that can be made, got {error.strerror}") from error
        yield folder


def _check(subject: Subject, measurement: Measurement) -> None:
    """Say what went wrong; stop if nothing went right."""
    failed = [v for v in measurement.variants if v.failed]
    if len(failed) < len(measurement.variants):
        return
    if failed[0].trace_back:
        print(failed[0].trace_back, file=sys.stderr, end="")
    raise UsageError(f"{subject.name}: {failed[0].name}: {failed[0].failed}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
