"""The report of a profile: a table for the terminal, what to change, and a plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from genai_fast.errors import require
from genai_fast.profiling.diagnosis import diagnose
from genai_fast.profiling.loops import EAGER, FUSED, LOOP, TUNED

UNKNOWN = "unknown"
_BARS = 10  # operators in the picture
_SHORTENED = 38  # characters of an operator's name there


def as_text(report: dict[str, Any]) -> str:
    """The report for people: what ran where, one column per variant, what to change."""
    lines = [f"{report['model']}: {report['what']}", *machine_lines(report)]
    good = {name: v for name, v in report["variants"].items() if "failed" not in v}
    lines += [*_headline(report, good), "", *_table(report, good)]
    lines += [f"{name}: failed: {v['failed']}" for name, v in report["variants"].items() if "failed" in v]
    lines += _remarks(report, good)
    first = next(iter(good))
    lines += ["", f"what to change ({first}):", *advice(report, first)]
    if FUSED in good and first != FUSED:
        lines += [f"what remains ({FUSED}):", *advice(report, FUSED)]
    return "\n".join(lines)


def machine_lines(report: dict[str, Any]) -> list[str]:
    """Device, threads, versions, and what tune_cpu does here."""
    where = report["environment"]
    threads = "" if report["device"] == "cuda" else f" (threads: {where['threads']})"
    tuned = [f"tune_cpu: {report['tune_cpu']}"] if report["tune_cpu"] else []
    return [f"{where['device']}{threads}, torch {where['torch']}", *tuned]


def advice(report: dict[str, Any], name: str) -> list[str]:
    """What to change about a variant, numbered."""
    return [f"  {k}. {text}" for k, text in enumerate(diagnose(report, name), 1)] or ["  nothing stands out"]


def _headline(report: dict[str, Any], good: dict[str, dict[str, Any]]) -> list[str]:
    """How many times faster each variant is than the first, by the medians of steps that took turns; and the load."""
    first, *others = (name for name in good if name != TUNED)
    tuned = []
    if TUNED in good:
        how = f"tuned {_ratio(good[first], good[TUNED]):.2f} x {first}, after the others, under genai_fast.tune_cpu()"
        tuned = [f"{how}: {report['tuned']}"]
    if not others:
        return tuned
    ratios = ", ".join(f"{name} {_ratio(good[first], good[name]):.2f} x {first}" for name in others)
    load = report["foreign_load"]
    busy = "an unknown number of" if load is None else f"{load:.1f}"
    cores = report["environment"]["cores"]
    return [f"{ratios} (medians of alternating steps; other programs kept {busy} of {cores} cores busy)", *tuned]


def _ratio(base: dict[str, Any], variant: dict[str, Any]) -> float:
    return base["step_seconds"]["p50"] / variant["step_seconds"]["p50"]


def _table(report: dict[str, Any], good: dict[str, dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("", *good)]

    def row(title: str, cell: Callable[[dict[str, Any]], str | None]) -> None:
        cells = [cell(v) for v in good.values()]
        if any(cells):
            rows.append((title, *(text or UNKNOWN for text in cells)))

    cuda, base = report["device"] == "cuda", next(iter(good.values()))
    if len(good) > 1:
        row(f"times {next(iter(good))}", lambda v: f"{_ratio(base, v):.2f} x")
    row(f"{base['unit']}/s, mean", lambda v: _short(v["per_second"]))
    row("step p50 ms", lambda v: _ms(v["step_seconds"]["p50"]))
    row("step p95 ms", lambda v: _ms(v["step_seconds"]["p95"]))
    row("step max ms", lambda v: _ms(v["step_seconds"]["max"]))
    row("waiting for data", lambda v: _percent(v["data_wait"]))
    if cuda:
        row("host ms", lambda v: _ms(v["host_seconds"]))
        row("device ms", lambda v: _ms(v["device_seconds"]))
        row("device busy", lambda v: _percent(v["device_busy"]))
        row("kernels per step", lambda v: _short(v["kernels"]))
        row("launches per step", lambda v: _short(v["launches"]))
    row("operator calls per step", lambda v: _short(v["operator_calls"]))
    row("FLOP per step", lambda v: _at_least(v, _short(v["flops"])))
    row("FLOP/s", lambda v: _at_least(v, _short(v["flops_per_second"])))
    if report["peak"] is not None:
        row(f"of {_peak(report)}", lambda v: _at_least(v, _percent(v["flops_share_of_peak"])))
    if cuda:
        row("peak MiB allocated", lambda v: _mebibytes(v["peak_allocated_bytes"]))
        row("peak MiB reserved", lambda v: _mebibytes(v["peak_reserved_bytes"]))
        row("allocator retries", lambda v: str(v["allocator_retries"]))
    else:
        row("peak MiB resident, growth", lambda v: _mebibytes(v["peak_resident_growth_bytes"]))
        row("page faults per step", lambda v: _short(v["page_faults"]))
    row(f"J per {base['unit'][:-1]}", lambda v: _short(v["joules"]))
    row("W", lambda v: _short(v["watts"]))
    row("first step s", lambda v: f"{v['first_step_seconds']:.2f}")
    row("steps measured", lambda v: str(v["steps"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])]
    return ["  ".join(forms).format(*row) for row in rows]


def _peak(report: dict[str, Any]) -> str:
    return f"the {_short(report['peak']['flops_per_second'])}FLOP/s of {report['peak']['precision']} matmuls here"


def _remarks(report: dict[str, Any], good: dict[str, dict[str, Any]]) -> list[str]:
    said = [report["energy"] if report["device"] == "cuda" else "", report["ended"]]
    if all(v["data_wait"] is None for v in good.values()):
        said.append(f"waiting for data: {report['no_wait']}")
    if report["device"] == "cpu" and len(good) > 1:
        said.append(f"resident memory: one-time allocations of libraries count in {next(iter(good))}")
    uncounted = sorted({name for v in good.values() for name in v["flops_not_counted"]})
    if uncounted:
        said.append(f"FLOP not counted of: {', '.join(uncounted)}")
    if (load := report["foreign_load"] or 0.0) > 0.2:
        said.append(f"other programs kept {load:.1f} cores busy during the measurement, which distorts it")
    return [text for text in said if text]


def _at_least(variant: dict[str, Any], text: str | None) -> str | None:
    return f">= {text}" if text and variant["flops_not_counted"] else text


def _ms(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1e3 * seconds:.4g}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _mebibytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:,.1f}"


def _short(x: float | None) -> str | None:
    """Four digits and a letter: 1.234 G."""
    if x is None:
        return None
    for letter, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(x) >= scale:
            return f"{x / (1e3 if letter == 'k' else scale):.4g} {letter}"
    return f"{x:.4g}"


def draw(report: dict[str, Any], path: Path) -> None:
    """A picture: each step's time in order, and where the time of each variant goes."""
    figures = require("matplotlib.figure", "train")
    require("matplotlib.backends.backend_agg", "train")
    good = {name: v for name, v in report["variants"].items() if "failed" not in v}
    # A figure of its own: pyplot would choose a window system for the whole process.
    figure = figures.Figure(figsize=(11, 3.2 + 2.6 * len(good)), dpi=110, layout="constrained")
    figure.suptitle(f"{report['model']}: {report['what']}, {report['environment']['device']}", fontsize=9)
    line, *bars = figure.subplots(1 + len(good), 1, height_ratios=[3, *[2.6] * len(good)])
    colours = {EAGER: "C0", LOOP: "C0", FUSED: "C2", TUNED: "C3"}
    for name, v in good.items():
        times = [1e3 * t for t in v["timeline"]]
        line.plot(range(1, len(times) + 1), times, lw=0.8, marker=".", ms=3, color=colours.get(name, "C1"), label=name)
    line.set(xlabel="measured step", ylabel="ms", ylim=(0, None))
    line.legend(frameon=False, fontsize=8)
    for axes, (name, v) in zip(bars, good.items(), strict=True):
        top = v["operators"][:_BARS][::-1]
        names = [o["name"] if len(o["name"]) <= _SHORTENED else o["name"][:_SHORTENED] + "..." for o in top]
        axes.barh(range(len(top)), [1e3 * o["own_seconds"] for o in top], color=colours.get(name, "C1"))
        axes.set_yticks(range(len(top)), names, fontsize=7)
        axes.set_xlabel(f"ms per step, {name}, under the profiler", fontsize=8)
    figure.savefig(path)
