"""What mkdocs calls: generated pages and their places in the menu, and links to files of the repository."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import site_pages  # noqa: E402

from genai_fast.models.commands import FAMILIES  # noqa: E402
from genai_fast.registry import OPS  # noqa: E402
from genai_fast.versions import __version__  # noqa: E402

_pages: dict[str, str] = {}


def on_config(config: Any) -> Any:
    project = tomllib.loads((site_pages.ROOT / "pyproject.toml").read_text())["project"]
    urls = project.get("urls", {})
    config.site_description = project["description"]
    config.repo_url, config.site_url = urls.get("Repository"), urls.get("Documentation", "")
    config.extra["version_text"] = __version__
    for section in config.nav:
        for title, entries in section.items():
            if title == "Ops":
                entries += [f"ops/{name}.md" for name in OPS]
            elif title == "Models":
                entries += [*(f"models/{family}.md" for family in FAMILIES), "models/settings.md"]
    return config


def on_files(files: Files, config: Any) -> Files:
    site = site_pages.Site()
    _pages.clear()
    _pages.update(site.pages)
    for path in sorted(site.pictures):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(site_pages.ROOT / path)))
    for page, text in _pages.items():
        if page not in site_pages.written():
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Of a written page, with its links resolved; generated ones have theirs."""
    uri = page.file.src_uri
    return _pages[uri] if uri in site_pages.written() else markdown
