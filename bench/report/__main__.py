"""Tables and plots of what was measured.

    python -m bench.report bench/results/<device> [--out DIR]
    python -m bench.report --headline bench/results [README.md]

A folder, or files, of records that `pytest bench/ --benchmark-only --record` or, on a GPU, `python -m bench.gpu_gate`
wrote: README.md and its plots, beside them or in DIR. `--headline` prints the few rows of each device that the
top-level README.md shows, or writes them between its marks.
"""

import argparse
import sys
from pathlib import Path

from bench.report import headline, page, records
from bench.report.files import write_all
from bench.report.records import ReportError
from genai_fast.errors import UsageError
from genai_fast.table import write_between


def report(paths: list[Path], out: Path | None) -> tuple[str, list[Path]]:
    """What to print, and the files that were written: all of them, or none."""
    found = records.read_all(paths)
    folders = {record.path.parent for record in found}
    if out is None and len(folders) > 1:
        folders = records.listed(map(str, sorted(folders)))
        raise ReportError(f"expected records of one folder, or --out, got {folders}")
    folder = out or folders.pop()
    target, former = folder / page.PAGE, set[Path]()
    if target.exists():
        if page.MARK not in target.read_text():
            raise ReportError(
                f"{target}: expected a page of this report, got another's, which is kept; remedy: another --out"
            )
        former = {folder / name for name in page.IMAGES}
    made = {folder / name: content for name, content in page.page(found).items()}
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
    parser.add_argument(
        "--headline", type=Path, metavar="RESULTS", help="the rows of each device whose records are there"
    )
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
