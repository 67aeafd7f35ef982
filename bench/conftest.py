"""Collects bench_*.py (plain `pytest` stays in tests/), names the device, and prints the summary."""

from typing import Any

import pytest

from bench import roofs
from bench.points import DEVICE
from bench.report.tables import summary
from genai_fast.profiling.machine import environment

FIGURES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_collect_file(file_path, parent):
    # A file named on the command line is pytest's to collect.
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["genai_fast"] = {**environment(DEVICE), "roofs": roofs.roofs(DEVICE)}


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash[FIGURES]:
        terminalreporter.section("forward + backward, interleaved medians")
        terminalreporter.write_line(summary(config.stash[FIGURES]))


@pytest.fixture(scope="session")
def figures_of_session(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the summary prints; benchmarks append to it."""
    return request.config.stash[FIGURES]
