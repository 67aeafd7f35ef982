"""Tables and plots of what was measured.

    python -m bench.report FILE.json [--out DIR]
    python -m bench.report bench/results/<gpu> [--out DIR]
    python -m bench.report --headline bench/results [README.md]

FILE.json is what `pytest bench/ --benchmark-only --benchmark-json=FILE.json` wrote: DIR gets <name>.md and <name>.png.
A folder, or files, of records that `python -m bench.gpu_gate` wrote: README.md and its plots, beside them or in DIR.
`--headline` prints the few rows of each GPU that the top-level README.md shows, or writes them between its marks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.report import headline, page, plots, records, tables
from bench.report.files import write_all
from bench.report.records import ReportError
from genai_fast.errors import UsageError
from genai_fast.table import write_between


def load(path: Path) -> tuple[dict[str, Any], list[tables.Figure]]:
    """The machine's description and its figures, one per point, of pytest-benchmark's JSON.

    Raises ReportError: the file is missing, truncated, foreign, or holds no figures.
    """
    content = records.read_json(path)
    if not isinstance(content, dict) or not content.keys() >= {"benchmarks", "machine_info"}:
        raise ReportError(
            f"{path}: expected pytest-benchmark's JSON or a record of bench.gpu_gate, got neither:"
            f" it has no 'benchmarks' and 'machine_info', and no 'figures' and 'environment'"
        )
    found = [benchmark.get("extra_info", {}) for benchmark in content["benchmarks"]]
    # Each variant of a point carries the point's figures.
    figures = {(f["op"], f["case"], f["dtype"], f["device"]): f for f in found if records.is_figure(f)}
    if not figures:
        raise ReportError(f"{path}: holds no figures: every benchmark was skipped, refused, or not of this project")
    return content["machine_info"].get("genai_fast", {}), list(figures.values())


def _of_a_run(path: Path, folder: Path) -> tuple[str, dict[Path, bytes]]:
    machine, figures = load(path)
    text, image = (folder / f"{path.stem}{suffix}" for suffix in (".md", ".png"))
    lines = ["# Forward + backward against eager PyTorch", "", *tables.machine_lines(machine), ""]
    lines += [*tables.table(*tables.cells(figures)), ""]
    lines += ["time / fused: the variant's time over the fused op's, medians of interleaved runs in one process. MiB:"]
    lines += ["the peak memory of forward and backward beyond inputs and incoming gradients.", ""]
    lines += [*(f"- {note}" for note in tables.notes(figures)), "", f"![speed against the peers]({image.name})", ""]
    plot = plots.speed_plot(figures, machine.get("device", ""))
    return tables.summary(figures), {text: "\n".join(lines).encode(), image: plots.png(plot)}


def report(paths: list[Path], out: Path | None) -> tuple[str, list[Path]]:
    """What to print, and the files that were written: all of them, or none."""
    former: set[Path] = set()
    if len(paths) == 1 and not paths[0].is_dir() and not records.is_record(records.read_json(paths[0])):
        said, made = _of_a_run(paths[0], out or Path())
    else:
        found = records.read_all(paths)
        folders = {record.path.parent for record in found}
        if out is None and len(folders) > 1:
            folders = records.listed(map(str, sorted(folders)))
            raise ReportError(f"expected records of one folder, or --out, got {folders}")
        folder = out or folders.pop()
        target = folder / page.PAGE
        if target.exists():
            if page.MARK not in target.read_text():
                raise ReportError(
                    f"{target}: expected a page of this report, got another's, which is kept; remedy: another --out"
                )
            former = {folder / name for name in page.IMAGES}
        made = {folder / name: content for name, content in page.page(found).items()}
        said = f"{found[0].device}: {', '.join(f'{r.path.name} {r.verdict}' for r in found)}"
    write_all(made)
    for image in former - made.keys():
        image.unlink(missing_ok=True)  # bars of a gate that was green
    return said, list(made)


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
