"""Tables and a chart of what was measured.

    python -m bench.report FILE.json [--out DIR]

FILE is what `pytest bench/ --benchmark-only --benchmark-json=FILE` or `python -m bench.gpu_gate` wrote.
DIR gets <name>.md and <name>.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.points import COMPILED, FUSED

_REQUIRED = {"op", "case", "dtype", "device", "variants", "ratio"}
_HEADER = (
    "op",
    "case",
    "dtype",
    "peer",
    "peer us",
    "compile us",
    "fused us",
    "ratio",
    "GB/s",
    "of roof",
    "peer MiB",
    "fused MiB",
    "clock",
)


class ReportError(ValueError):
    """The file is not one that this report reads."""


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine's description and its figures, one a point.

    Raises:
        ReportError: the file is missing, truncated, foreign, or holds no figures.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: is not JSON, or was cut off ({error}); measure again") from error
    if not isinstance(content, dict):
        content = {}
    if "benchmarks" in content and "machine_info" in content:  # pytest-benchmark's
        machine = content["machine_info"].get("genai_fast", {})
        found = [benchmark.get("extra_info", {}) for benchmark in content["benchmarks"]]
    elif "figures" in content and "environment" in content:  # the GPU gate's
        machine, found = content["environment"], content["figures"]
    else:
        raise ReportError(
            f"{path}: expected pytest-benchmark's JSON or a record of bench.gpu_gate, got neither:"
            f" it has no 'benchmarks' and 'machine_info', and no 'figures' and 'environment'"
        )
    # Each variant of a point carries the point's figures.
    figures = {(f["op"], f["case"], f["dtype"], f["device"]): f for f in found if f.keys() >= _REQUIRED}
    if not figures:
        raise ReportError(f"{path}: holds no figures: every benchmark was skipped, refused, or not of this project")
    return machine, list(figures.values())


def _time(variant: dict[str, Any] | None) -> str:
    """Microseconds: on the device where that was measured, else of the clock on the wall."""
    if variant is None or "skipped" in variant:
        return "-"
    return f"{variant.get('device_us', variant['wall_us']):.1f}"


def _mebibytes(variant: dict[str, Any]) -> str:
    return f"{variant['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in variant else "-"


def _optional(figure: dict[str, Any], name: str, pattern: str) -> str:
    return pattern.format(figure[name]) if figure.get(name) is not None else "-"


def rows(figures: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row a point and eager peer, as text."""
    found = []
    for figure in figures:
        variants = figure["variants"]
        for peer in variants:
            if peer in (FUSED, COMPILED):
                continue
            found.append(
                (
                    figure["op"],
                    figure["case"],
                    figure["dtype"],
                    peer,
                    _time(variants[peer]),
                    _time(variants.get(COMPILED)),
                    _time(variants[FUSED]),
                    f"{figure['ratio'][peer]:.2f}",
                    _optional(figure, "gigabytes_per_second", "{:.1f}"),
                    _optional(figure, "share_of_roof", "{:.0%}"),
                    _mebibytes(variants[peer]),
                    _mebibytes(variants[FUSED]),
                    variants[FUSED].get("device_clock", "wall"),
                )
            )
    return found


def summary(figures: Iterable[dict[str, Any]]) -> str:
    """The table as aligned text, and what else the reader must know."""
    figures = list(figures)
    lines = [_HEADER, *rows(figures)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *notes(figures)])


def notes(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Skipped variants, and points that were measured beside other work."""
    found = []
    for figure in figures:
        name = f"{figure['op']} {figure['case']} {figure['dtype']}"
        for variant, values in figure["variants"].items():
            if "skipped" in values:
                found.append(f"{name}: {variant} was skipped: {values['skipped']}")
        if (figure.get("foreign_load") or 0.0) > 0.1:
            found.append(f"{name}: other programs kept {figure['foreign_load']:.1f} processors busy meanwhile")
    return found


def markdown(machine: dict[str, Any], figures: list[dict[str, Any]]) -> str:
    """The report's text: machine, table, notes."""
    lines = ["# Forward + backward against eager PyTorch", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items() if not isinstance(value, dict)]
    for roof, value in machine.get("roofs", {}).items():
        unit = "GB/s" if roof == "bytes_per_second" else "GFLOP/s"
        lines.append(f"- roof, {'copy' if unit == 'GB/s' else roof}: {value / 1e9:.1f} {unit}")
    lines += ["", "| " + " | ".join(_HEADER) + " |", "| " + " | ".join("---" for _ in _HEADER) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(figures)]
    lines += [
        "",
        "ratio: the peer's time over the fused op's, medians of interleaved runs in one process. MiB: the most memory",
        "that forward and backward hold beyond inputs and incoming gradients.",
        "",
    ]
    return "\n".join([*lines, *(f"- {note}" for note in notes(figures)), ""])


def chart(machine: dict[str, Any], figures: list[dict[str, Any]], path: Path) -> None:
    """Speed against the first eager peer: a group of bars a case, for eager, torch.compile and fused."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars: dict[str, list[float]] = {"eager": [], "torch.compile": [], "genai_fast": []}
    for figure in figures:
        eager = next(iter(figure["ratio"].values()))
        bars["eager"].append(1.0)
        bars["torch.compile"].append(eager / figure["ratio"][COMPILED] if COMPILED in figure["ratio"] else 0.0)
        bars["genai_fast"].append(eager)
    labels = [f"{f['op']}\n{f['case']}, {f['dtype']}" for f in figures]
    plot, axes = pyplot.subplots(figsize=(8.0, 1.2 + 0.6 * len(figures)))
    for k, (name, lengths) in enumerate(bars.items()):
        where = [i + 0.27 * (k - 1) for i in range(len(figures))]
        drawn = axes.barh(where, lengths, 0.25, label=name, color=("#9aa0a6", "#e8a33d", "#2f7ed8")[k])
        axes.bar_label(drawn, [f"{x:.1f}" if x else "none" for x in lengths], fontsize=7, padding=2)
    axes.axvline(1.0, color="#5f6368", linewidth=0.6)
    axes.set_yticks(range(len(figures)), labels, fontsize=7)
    axes.invert_yaxis()  # the first case on top
    axes.set_xlabel("speed, eager = 1")
    axes.set_title(machine.get("device", ""), fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    plot.tight_layout()
    plot.savefig(path, dpi=150)
    pyplot.close(plot)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder for the report (here)")
    options = parser.parse_args(arguments)
    try:
        machine, figures = load(options.file)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    text, image = (options.out / f"{options.file.stem}{suffix}" for suffix in (".md", ".png"))
    text.write_text(markdown(machine, figures) + f"\n![speed against eager]({image.name})\n")
    chart(machine, figures, image)
    print(summary(figures))
    print(f"written: {text}, {image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
