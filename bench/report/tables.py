"""Figures as text: one row per variant, the same columns for ops, training steps and decoding."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.points import COMPILED, FUSED

BUSY = 0.1  # processors that other programs kept busy, above which a note says so
_UNITS = {"memory_bytes": (2**30, "GiB"), "power_watts": (1, "W"), "power_limit_watts": (1, "W")}

Figure = dict[str, Any]


def title(figure: Figure) -> str:
    """What a figure is of."""
    name = figure["op"] if "op" in figure else f"training step of {figure['system']}"
    case = figure.get("case") if figure.get("case") != figure.get("system") else None
    return " ".join(filter(None, (name, case, figure.get("dtype"))))


def milliseconds(us: float) -> str:
    return f"{us / 1e3:.{4 if us < 1e2 else 3 if us < 1e4 else 1}f}"


def best(figure: Figure) -> tuple[str | None, float | None]:
    """The fastest peer, and its time over the fused one's."""
    return min(figure.get("ratio", {}).items(), key=lambda pair: pair[1], default=(None, None))


def speed(ratio: float | None) -> str:
    """A peer's time over the fused one's, marked if fused is slower."""
    return "-" if ratio is None else f"{ratio:.2f}" if ratio >= 1.0 else f"**{ratio:.3f} slower**"


def slower(figures: Iterable[Figure]) -> list[tuple[str, str, float]]:
    """(title, best peer, its time over the fused one's) wherever a peer is faster."""
    return [(title(f), *best(f)) for f in figures if f["ratio"] and best(f)[1] < 1.0]


def notes(figures: Iterable[Figure]) -> list[str]:
    """What else a reader must know of figures."""
    found = []
    for f in figures:
        name, variants = title(f), f["variants"]
        found += [f"{name}: {v} was skipped: {x['skipped']}" for v, x in variants.items() if "skipped" in x]
        if by := [v for v, x in variants.items() if x.get("device_clock") == "events"]:
            found.append(f"{name}: {', '.join(by)} not captured as a graph: launches may count")
        if variants[FUSED].get("captured") is False:
            found.append(f"{name}: the fused step is not a captured graph")
        if (f.get("foreign_load") or 0.0) > BUSY:
            found.append(f"{name}: other programs kept {f['foreign_load']:.1f} processors busy during the run")
    return found


def cell(values: Mapping[str, Any], name: str, form: str | Callable[[Any], str]) -> str:
    """A value as a format string or a function gives it; "-" if there is none."""
    value = values.get(name)
    return "-" if value is None else form(value) if callable(form) else form.format(value)


# Header, key and form: of each variant, of the fused one alone, and of the latter only where speed may be shown.
_VARIANT = (
    ("ms", "wall_us", milliseconds),
    ("device ms", "device_us", milliseconds),
    ("MiB", "peak_bytes", lambda n: f"{n / 2**20:.1f}"),
    ("launches", "launches", "{}"),
    ("J/step", "joules_per_step", "{:.3g}"),
)
_OF_FUSED = (
    ("sampled ms", "sampled_us", milliseconds), ("samples/s", "samples_per_second", "{:.0f}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"), ("MFU", "mfu", "{:.1%}"), ("MFU of", "mfu_precision", "{}"),
)  # fmt: skip
_GREEN = (
    ("GB/s", "gigabytes_per_second", "{:.4g}"),
    ("GFLOP/s", "gigaflops_per_second", "{:.4g}"),
    ("of roof", "share_of_roof", "{:.0%}"),
)


def cells(figures: Iterable[Figure], green: bool = True) -> list[list[str]]:
    """Header and rows, fused last of each figure, without columns in which nothing was measured.

    Args:
        green: whether speed-ups may be shown.
    """
    of_fused = _OF_FUSED + (_GREEN if green else ())
    header = ["case", "variant", *(c[0] for c in _VARIANT + of_fused)]
    lines = [header + (["time / fused", "best peer / fused"] if green else [])]
    for f in figures:
        ran = {name: v for name, v in f["variants"].items() if "skipped" not in v}
        for name in sorted(ran, key=lambda name: (name == FUSED, name.startswith(COMPILED), name)):
            mine = f if name == FUSED else {}
            row = [title(f), name, *(cell(ran[name], *c[1:]) for c in _VARIANT)]
            row += [cell(mine, *c[1:]) for c in of_fused]
            lines.append(row + ([cell(f["ratio"], name, speed), speed(best(mine)[1])] if green else []))
    kept = [k for k, column in enumerate(zip(*lines, strict=True)) if set(column[1:]) != {"-"}]
    return [[line[k] for k in kept] for line in lines]


def table(header: Sequence[str], *rows: Sequence[str]) -> list[str]:
    """Lines of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in line) + " |" for line in lines]


def summary(figures: Iterable[Figure]) -> str:
    """For a terminal of 100 columns: by op, a line for each point, and the notes."""
    figures, lines = sorted(figures, key=lambda f: f["op"]), []
    for op, found in itertools.groupby(figures, key=lambda f: f["op"]):
        columns = (("fused ms", 10), ("eager ms", 10), ("x eager", 9), ("quartiles", 12), ("x best", 8), ("memory", 7))
        lines.append(f"{op:<44}" + "".join(name.rjust(width) for name, width in columns))
        lines += map(_line, sorted(found, key=lambda f: f["case"]))
    return "\n".join([*lines, *notes(figures)])


def _line(figure: Figure) -> str:
    variants, peers = figure["variants"], figure["ratio"]
    first = next(iter(peers), "")  # eager, or what stands for it
    low, high = figure.get("spread", {}).get(first, (None, None))
    clocks = [variants.get(v, {}) for v in (FUSED, first)]
    times = [cell({"us": c.get("device_us", c.get("wall_us"))}, "us", milliseconds) for c in clocks]
    dtype = "" if figure["dtype"] == "float32" else f" {figure['dtype']}"
    case = figure["case"][: 42 - len(dtype)] + dtype
    share = "-" if low is None else f"{low:.2f}-{high:.2f}"
    held = [variants.get(v, {}).get("peak_bytes") for v in (FUSED, first)]
    memory = f"{held[0] / held[1]:.0%}" if all(held) else "-"
    ratio, fastest = (cell({"x": x}, "x", "{:.2f}") for x in (peers.get(first), best(figure)[1]))
    return f"  {case:<42}{times[0]:>10}{times[1]:>10}{ratio:>9}{share:>12}{fastest:>8}{memory:>7}"


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """Device, driver, versions and measured roofs."""
    lines = []
    for name, value in machine.items():
        if name in _UNITS and isinstance(value, (int, float)):
            scale, unit = _UNITS[name]
            value = f"{value / scale:.4g} {unit}"
        lines += [] if isinstance(value, dict) else [f"- {name}: {value}"]
    for roof, value in machine.get("roofs", {}).items():
        name, unit = ("copy", "GB/s") if roof == "bytes_per_second" else (roof, "GFLOP/s")
        lines.append(f"- roof, {name}: {value / 1e9:.1f} {unit}")
    return lines
