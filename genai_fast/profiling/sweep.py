"""A profile at several batch sizes: where throughput stops growing."""

from pathlib import Path
from typing import Any

from genai_fast.errors import require
from genai_fast.profiling import report

ENOUGH = 0.9  # of the highest throughput: the knee is the smallest batch that reaches it


def sweep(reports: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """{"model", "what", "device", "environment", "knee": {variant: batch}, "batches": {batch: its report}}.

    Args:
        reports: by batch, what `figures` found, each with at least one variant that did not fail.
    """
    first = next(iter(reports.values()))
    same = {name: first[name] for name in ("model", "what", "device", "environment")}
    names = dict.fromkeys(name for found in reports.values() for name, _ in _good(found))
    knees = {name: knee({batch: speed for batch, speed in _speeds(reports, name)}) for name in names}
    return {**same, "knee": knees, "batches": reports}


def knee(speeds: dict[int, float]) -> int:
    """The smallest batch whose samples a second are at least ENOUGH of the most that any reaches."""
    most = max(speeds.values())
    return min(batch for batch, speed in speeds.items() if speed >= ENOUGH * most)


def as_text(found: dict[str, Any]) -> str:
    """A line a batch, the knee, and what to change there."""
    reports, names = found["batches"], [*found["knee"]]
    first = next(iter(reports.values()))
    unit, memory = _unit(first), "peak MiB"
    heads = ["batch", *(f"{name} {unit}/s" for name in names), *(f"{name} ms" for name in names)]
    heads += [f"{name} x" for name in names[1:]] + [f"{name} {memory}" for name in names]
    rows = [tuple(heads), *(_row(batch, one, names) for batch, one in reports.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    others = ", ".join(str(batch) for batch in [*reports][1:])
    lines = [f"{found['model']}: {first['what']}; then batches of {others}", *report.machine_lines(first), ""]
    lines += ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += ["", *(f"knee of {name}: {_said(batch, reports)}" for name, batch in found["knee"].items())]
    last = names[-1]
    at = found["knee"][last]
    return "\n".join([*lines, "", f"what to change ({last}, batch {at}):", *report.advice(reports[at], last)])


def _said(batch: int, reports: dict[int, Any]) -> str:
    if batch == max(reports):
        return f"not reached; {batch} is the largest that was measured"
    return f"a batch of {batch} has {ENOUGH:.0%} of the highest throughput or more; a larger one adds little but memory"


def draw(found: dict[str, Any], path: Path) -> None:
    """Samples a second over the batch, the knees marked."""
    figures = require("matplotlib.figure", "train")
    require("matplotlib.backends.backend_agg", "train")
    figure = figures.Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    figure.suptitle(f"{found['model']}, {found['environment']['device']}", fontsize=9)
    axes = figure.subplots()
    for colour, (name, at) in enumerate(found["knee"].items()):
        batches, speeds = zip(*_speeds(found["batches"], name), strict=True)
        axes.plot(batches, speeds, marker="o", ms=4, color=f"C{colour}", label=name)
        axes.axvline(at, color=f"C{colour}", lw=0.8, ls="--", label=f"knee of {name}: {at}")
    unit = _unit(next(iter(found["batches"].values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks([*found["batches"]], [str(batch) for batch in found["batches"]])
    axes.set(xlabel="batch", ylabel=f"{unit} per second", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _good(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, variant) for name, variant in found["variants"].items() if "failed" not in variant]


def _speeds(reports: dict[int, dict[str, Any]], name: str) -> list[tuple[int, float]]:
    found = [(batch, dict(_good(one)).get(name)) for batch, one in reports.items()]
    return [(batch, variant["per_second"]) for batch, variant in found if variant is not None]


def _unit(found: dict[str, Any]) -> str:
    return _good(found)[0][1]["unit"]


def _row(batch: int, found: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    good = dict(_good(found))
    base = good.get(names[0])

    def cells(text: Any, given: list[str] = names) -> list[str]:
        return [text(good[name]) if name in good else "failed" for name in given]

    def ratio(variant: dict[str, Any]) -> str:
        return "" if base is None else f"{base['step_seconds']['p50'] / variant['step_seconds']['p50']:.2f}"

    memory = "peak_allocated_bytes" if found["device"] == "cuda" else "peak_resident_growth_bytes"
    return (
        str(batch),
        *cells(lambda v: f"{v['per_second']:,.0f}"),
        *cells(lambda v: f"{1e3 * v['step_seconds']['p50']:.4g}"),
        *cells(ratio, names[1:]),
        *cells(lambda v: report.UNKNOWN if v[memory] is None else f"{v[memory] / 2**20:,.0f}"),
    )
