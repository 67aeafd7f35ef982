"""What a terminal is told: commands that can be pasted."""

import shlex
import subprocess
import sys

import pytest

from genai_fast import terminal
from genai_fast.cli import demo


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An environment with the program, in a folder with a space; the current folder is its parent."""
    bin_folder = tmp_path / "my env" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("genai-fast", "python"):
        (bin_folder / name).write_text(f'#!{sys.executable}\nimport sys; print("ran", *sys.argv[1:])\n')
        (bin_folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return bin_folder


def ran(line):
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout


def test_the_name_is_used_if_the_shell_finds_it(installed, monkeypatch):
    monkeypatch.setenv("PATH", f"{installed}:/usr/bin:/bin")
    assert terminal.command("doctor") == "genai-fast doctor"


def test_elsewhere_it_is_the_path_of_the_running_program(installed, monkeypatch):
    line = terminal.command("sample", "runs/a b", "--count", 3)
    assert line == "'my env/bin/genai-fast' sample 'runs/a b' --count 3"
    assert ran(line) == "ran sample runs/a b --count 3\n"
    (installed / "elsewhere").mkdir()
    monkeypatch.chdir(installed / "elsewhere")
    assert ran(terminal.command("doctor")) == "ran doctor\n"


def test_another_program_of_the_name_is_not_the_running_one(installed, monkeypatch, tmp_path):
    (tmp_path / "genai-fast").write_text("#!/bin/sh\necho another\n")
    (tmp_path / "genai-fast").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert ran(terminal.command("doctor")) == "ran doctor\n"


def test_a_checkout_that_is_not_installed_runs_as_a_module(installed):
    (installed / "genai-fast").unlink()
    assert shlex.split(terminal.command("doctor")) == [str(installed / "python"), "-m", "genai_fast", "doctor"]


def test_demos_name_commands_that_work(installed):
    said = demo._next(("sample", "runs/a b"), ("doctor",)).splitlines()
    assert [line[:12] for line in said] == ["next:       ", "            "]
    assert [ran(line[12:]) for line in said] == ["ran sample runs/a b\n", "ran doctor\n"]
