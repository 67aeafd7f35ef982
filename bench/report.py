"""Tables and plots of what was measured.

    python -m bench.report FILE.json [--out DIR]
    python -m bench.report bench/results/<gpu> [--out DIR]
    python -m bench.report --headline bench/results [README.md]

FILE.json is what `pytest bench/ --benchmark-only --benchmark-json=FILE.json` wrote: DIR gets <name>.md and <name>.png.
A folder, or files, of records that `python -m bench.gpu_gate` wrote: README.md and its plots, beside them or in DIR.
`--headline` prints the few rows of each GPU that the top-level README.md shows, or writes them between its marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import headline, records, results_page
from bench.points import COMPILED, FUSED
from bench.record import write_all
from bench.records import ReportError, notes
from bench.results_page import machine_lines, new_figure, png
from genai_fast.errors import UsageError
from genai_fast.table import write_between

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


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine's description and its figures, one a point, of pytest-benchmark's JSON.

    Raises:
        ReportError: the file is missing, truncated, foreign, or holds no figures.
    """
    content = records.read_json(path)
    if not isinstance(content, dict) or not content.keys() >= {"benchmarks", "machine_info"}:
        raise ReportError(
            f"{path}: expected pytest-benchmark's JSON or a record of bench.gpu_gate, got neither:"
            f" it has no 'benchmarks' and 'machine_info', and no 'figures' and 'environment'"
        )
    found = [benchmark.get("extra_info", {}) for benchmark in content["benchmarks"]]
    # Each variant of a point carries the point's figures.
    figures = {(f["op"], f["case"], f["dtype"], f["device"]): f for f in found if f.keys() >= records.FIGURE}
    if not figures:
        raise ReportError(f"{path}: holds no figures: every benchmark was skipped, refused, or not of this project")
    return content["machine_info"].get("genai_fast", {}), list(figures.values())


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
            if peer in (FUSED, COMPILED) or "skipped" in variants[peer]:
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


def markdown(machine: dict[str, Any], figures: list[dict[str, Any]]) -> str:
    """The report's text: machine, table, notes."""
    lines = ["# Forward + backward against eager PyTorch", ""]
    lines += machine_lines(machine)
    lines += ["", "| " + " | ".join(_HEADER) + " |", "| " + " | ".join("---" for _ in _HEADER) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(figures)]
    lines += [
        "",
        "ratio: the peer's time over the fused op's, medians of interleaved runs in one process. MiB: the most memory",
        "that forward and backward hold beyond inputs and incoming gradients.",
        "",
    ]
    return "\n".join([*lines, *(f"- {note}" for note in notes(figures)), ""])


def chart(machine: dict[str, Any], figures: list[dict[str, Any]]) -> Any:
    """Speed against the first eager peer: a group of bars a case, for eager, torch.compile and fused."""
    bars: dict[str, list[float]] = {"eager": [], "torch.compile": [], "genai_fast": []}
    for figure in figures:
        eager = next(iter(figure["ratio"].values()))
        bars["eager"].append(1.0)
        bars["torch.compile"].append(eager / figure["ratio"][COMPILED] if COMPILED in figure["ratio"] else 0.0)
        bars["genai_fast"].append(eager)
    labels = [f"{f['op']}\n{f['case']}, {f['dtype']}" for f in figures]
    plot = new_figure(8.0, 1.2 + 0.6 * len(figures))
    axes = plot.subplots()
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
    return plot


def report(paths: list[Path], out: Path | None) -> tuple[str, list[Path]]:
    """What to say, and the files that were written: all of them, or none."""
    if len(paths) == 1 and not paths[0].is_dir() and not records.is_record(records.read_json(paths[0])):
        machine, figures = load(paths[0])
        text, image = ((out or Path()) / f"{paths[0].stem}{suffix}" for suffix in (".md", ".png"))
        shown = markdown(machine, figures) + f"\n![speed against eager]({image.name})\n"
        files = {text: shown.encode(), image: png(chart(machine, figures))}
        write_all(files)
        return summary(figures), list(files)
    found = records.read_all(paths)
    folders = {record.path.parent for record in found}
    if out is None and len(folders) > 1:
        raise ReportError(f"expected records of one folder, or --out, got {records.listed(map(str, sorted(folders)))}")
    folder = out or folders.pop()
    page = folder / results_page.PAGE
    if page.exists() and results_page.MARK not in page.read_text():
        raise ReportError(
            f"{page}: expected a page of this report, got another's, which is kept; remedy: another --out"
        )
    former = {folder / name for name in results_page.IMAGES if page.exists()}
    made = {folder / name: content for name, content in results_page.page(found).items()}
    write_all(made)
    for image in former - made.keys():
        image.unlink(missing_ok=True)  # bars of a gate that was green
    return f"{found[0].device}: {', '.join(f'{r.path.name} {r.verdict}' for r in found)}", list(made)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths", type=Path, nargs="*", metavar="FILE or FOLDER", help="figures; with --headline a README"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (here; of records: beside them)")
    parser.add_argument("--headline", type=Path, metavar="RESULTS", help="the rows of each GPU whose records are there")
    options = parser.parse_args(arguments)
    if options.headline is None and not options.paths:
        parser.error("expected a file or folder of figures, or --headline RESULTS, got nothing")
    if options.headline and (len(options.paths) > 1 or options.out):
        parser.error("--headline: expected at most one file to write into, and no --out")
    try:
        if options.headline:
            rows = headline.headline(options.headline)
            if not options.paths:
                print(rows)
            for path in options.paths:
                write_between(path, headline.BEGIN, headline.END, rows)
            return 0
        said, written = report(options.paths, options.out)
    except (UsageError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{said}\nwritten: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
