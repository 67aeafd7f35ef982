"""What `pytest bench/ --benchmark-only` does beside clocking: options, the record, and the table at the end."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import recording
from bench.points import DEVICE
from bench.recording import QUIET, Recording
from bench.report import records, tables
from bench.report.__main__ import report
from genai_fast.profiling import ForeignLoad

HERE = Path(__file__).parent
RECORDING, FIGURES = pytest.StashKey[Recording](), pytest.StashKey[list[dict[str, Any]]]()
# Seconds a benchmark takes on two cores, by file: whole, and quick.
SECONDS = {
    "bench_ops": (14, 4),
    "bench_layers": (6, 5),
    "bench_training": (85, 12),
    "bench_meter": (5, 5),
    "bench_generation": (14, 0),
    "bench_hugging_face": (90, 0),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("genai_fast's benchmarks")
    group.addoption(
        "--quick", action="store_true", default=os.environ.get("GENAI_FAST_BENCH") == "quick",
        help="one case of each op, two blocks and four training steps, without torch.compile: under three minutes"
        " (also GENAI_FAST_BENCH=quick)",
    )  # fmt: skip
    group.addoption(
        "--record", nargs="?", type=Path, const=Path(), metavar="FILE",
        help="write each point's figures to FILE as they are measured (bench/results/<device>/<date>-<commit>.json);"
        " a run at the same commit continues it",
    )  # fmt: skip
    group.addoption("--against", type=Path, metavar="FILE", help="fail if a point is slower than in this record")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []
    if config.getoption("benchmark_only", False) and config.option.verbose <= 0:
        config.option.benchmark_quiet = True  # one table, ours
        config.option.benchmark_columns = []


def pytest_collect_file(file_path, parent):
    # A file named on the command line is pytest's to collect.
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        left_out = [item for item in items if item.path.parent == HERE and not item.get_closest_marker("quick")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if not config.getoption("benchmark_only", False):
        return []
    quick = bool(config.getoption("quick"))
    seconds = sum(SECONDS[item.path.stem][quick] for item in items if item.path.stem in SECONDS)
    return [f"about {seconds / 60:.0f} minutes on two cores" + ("" if quick else "; --quick: three"), *busy()]


def busy() -> list[str]:
    """What about this machine makes figures wrong."""
    load, said = ForeignLoad(), []
    time.sleep(0.5)
    if (others := load.cores() or 0.0) > QUIET:
        said.append(f"WARNING: other programs keep {others:.1f} processors busy: ratios will be wrong")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if (threads := torch.get_num_threads()) > (cores or threads):
        said.append(
            f"WARNING: {threads} threads on {cores} processors: ratios will be wrong; set OMP_NUM_THREADS={cores}"
        )
    return said


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[FIGURES]:
        terminalreporter.section("forward + backward, interleaved medians")
        terminalreporter.write_line(tables.summary(config.stash[FIGURES]))
    found = config.stash.get(RECORDING, None)
    if found and found.path and found.path.exists():
        terminalreporter.write_line(f"recorded: {found.path}")
        if found.path.is_relative_to(recording.RESULTS):
            said, written = report([found.path.parent], None)
            terminalreporter.write_line(f"{said}; written: {', '.join(map(str, written))}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if (former := config.getoption("against", None)) and RECORDING in config.stash:
        slower = recording.behind(config.stash[RECORDING].content, records.read(former).content)
        for line in slower:
            print(f"SLOWER {line}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if slower else session.exitstatus


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("quick"))


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recording:
    from bench.bench_hugging_face import SUBJECTS as LANGUAGE_MODELS
    from bench.bench_layers import SUBJECTS
    from bench.bench_ops import POINTS
    from bench.bench_training import SYSTEMS, served

    path = pytestconfig.getoption("record")
    head = recording.begin(DEVICE) if path else {}
    expected = {"figures": [*map(str, (*POINTS, *SUBJECTS, *LANGUAGE_MODELS))], "training": [*filter(served, SYSTEMS)]}
    pytestconfig.stash[RECORDING] = Recording(recording.path_for(head) if path == Path() else path, head, expected)
    return pytestconfig.stash[RECORDING]


@pytest.fixture
def measured(recorder: Recording, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Measures a point, records its figures and shows them at the end; skips one that the record has already."""

    def measure(benchmark: Any, stage: str, name: str, red: Callable[[], str], clock: recording.Clock) -> None:
        if benchmark.disabled:
            assert not red(), red()
            return
        if recorder.known(stage, name):
            pytest.skip("recorded already")
        found = recorder.measure(stage, name, red, clock)
        pytestconfig.stash[FIGURES].extend(found)
        benchmark.extra_info.update(found[0])

    return measure
