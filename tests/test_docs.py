"""The documentation: its links lead somewhere, and what it shows runs.

A console block whose title is one of TITLES is not run, only parsed; readers see the title, too. A `text` block titled
"prints" is what the Python block before it prints.
"""

import contextlib
import io
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs/_site"))

import site_links  # noqa: E402
import site_pages  # noqa: E402

from genai_fast.cli.parser import parser_of  # noqa: E402
from genai_fast.models.registry import RECIPES  # noqa: E402
from genai_fast.registry import OPS  # noqa: E402

TITLES = ("takes minutes", "needs your own files", "needs a GPU")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
WRITTEN = {page: path.read_text() for page, path in site_pages.written().items()}


def blocks(text):
    """(language, title, code) in order."""
    return [(found[1], found[2] or "", found[3]) for found in BLOCK.finditer(text)]


def commands(code):
    return [line.removeprefix("$ ") for line in code.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def pages():
    return site_pages.Site().pages


def test_every_link_leads_to_a_page_and_a_heading(pages):
    assert site_links.broken(pages) == []


def test_broken_links_are_found():
    wrong = {"a.md": "# A\n[1](b.md) [2](b.md#there) [3](c.md) `[4](d.md)`\n[5](http://x.org)\n", "b.md": "# B\n"}
    found = [line.partition(": ")[2] for line in site_links.broken(wrong)]
    assert found == [
        "b.md#there: there is no such heading", "c.md: there is no such page", "http://x.org: expected https",
    ]  # fmt: skip


def test_every_op_and_every_model_has_a_place(pages):
    assert {f"ops/{name}.md" for name in OPS} <= {*pages}
    shown = "".join(text for page, text in pages.items() if page.startswith("models/"))
    assert [name for name in RECIPES if f"## `{name}`" not in shown] == []


def test_every_page_that_people_write_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in WRITTEN if f": {page}\n" not in menu] == []


@pytest.mark.parametrize("page", [page for page, text in WRITTEN.items() if "```python" in text])
def test_python_of_a_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "__main__"}, io.StringIO()
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])
    for language, title, code in blocks(WRITTEN[page]):
        if language == "python":
            assert title == "", f"{page}: every Python block runs"
            printed = io.StringIO()
            # Methods are read from files; a page's own line numbers would name the wrong ones.
            file = tmp_path / f"block{len(list(tmp_path.iterdir()))}.py"
            file.write_text(code)
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(file), "exec"), names)
        elif title == "prints":
            lines = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert code.splitlines() == lines, "\n".join(lines)


def test_examples_of_ops_run(pages):
    ran = 0
    for name in OPS:
        for language, _, code in blocks(pages[f"ops/{name}.md"]):
            if language == "python":
                exec(compile(code, name, "exec"), {})
                ran += 1
    assert ran >= len(OPS) - 3  # gpt_decode, llama_decode and wavenet_decode take the weights of a whole model


def test_commands_are_of_the_command_line(pages):
    parser, seen = parser_of(), 0
    for page, text in pages.items():
        for language, title, code in blocks(text):
            if language == "console":
                assert title in ("", *TITLES), f"{page}: {title}"
                assert all(line.startswith("$ ") for line in code.splitlines()), f"{page}: {code}"
                for command in commands(code):
                    if command.startswith("genai-fast"):
                        parser.parse_args(shlex.split(command)[1:])
                        seen += 1
    assert seen > len(RECIPES)


@pytest.mark.parametrize("page", [p for p, t in WRITTEN.items() if any(b[:2] == ("console", "") for b in blocks(t))])
def test_commands_of_a_page_run(page, tmp_path):
    program = tmp_path / "bin" / "genai-fast"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m genai_fast "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for language, title, code in blocks(WRITTEN[page]):
        for command in commands(code) if (language, title) == ("console", "") else ():
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=variables, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="`make docs` installs mkdocs")
    pytest.importorskip("material", reason="`make docs` installs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/ops/layer_norm/index.html").exists()
