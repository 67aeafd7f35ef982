"""All pages of the documentation, path in the site -> Markdown: written, generated, and files that these link to."""

from __future__ import annotations

import re
from pathlib import Path

import site_models
import site_ops
from site_links import DOCS, ROOT, is_external, relative, repository_path, rewritten

INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
LANGUAGES = {
    ".py": "python", ".cpp": "cpp", ".h": "cpp", ".toml": "toml", ".json": "json", ".yml": "yaml", ".txt": "text",
    "": "text", ".cff": "yaml",
}  # fmt: skip


def written() -> dict[str, Path]:
    """The pages that people write, by their paths in the site."""
    return {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}


def generated() -> dict[str, str]:
    return {**site_ops.pages(), **site_models.pages()}


class Site:
    """Resolves links; a file of the repository that is linked to, and that no page includes, gets a page."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.pictures: set[str] = set()  # of the repository, at source/<path> in the site
        texts = {page: (path.read_text(), "docs") for page, path in written().items()}
        texts |= {page: (text, "") for page, text in generated().items()}
        # Path in the repository -> the page on which it is.
        self.homes = {f"docs/{page}": page for page in texts}
        for page, (text, base) in texts.items():
            self.homes |= {repository_path(path, base): page for path in INCLUDE.findall(text)}
        for page, (text, base) in texts.items():
            self.pages[page] = self._resolved(text, base, page)

    def _resolved(self, text: str, base: str, page: str) -> str:
        text = rewritten(text, lambda target: self._target(target, base, page))
        return INCLUDE.sub(lambda found: self._included(repository_path(found[1], base), page), text)

    def _included(self, path: str, page: str) -> str:
        """A file's text without its title, since the page has its own."""
        text = (ROOT / path).read_text()
        return self._resolved(re.sub(r"\A# .*\n", "", text), Path(path).parent.as_posix(), page).strip()

    def _target(self, target: str, base: str, page: str) -> str:
        if is_external(target) or target.startswith("#"):
            return target
        path, mark, anchor = target.partition("#")
        path = repository_path(path, base)
        if path.startswith("docs/") and path not in self.homes:  # a picture or a style sheet
            return relative(path.removeprefix("docs/"), page) + mark + anchor
        if path.endswith(".png"):
            self.pictures.add(path)
            return relative(f"source/{path}", page)
        if path not in self.homes:
            self._show(path)
        return relative(self.homes[path], page) + mark + anchor

    def _show(self, path: str) -> None:
        """Make a page for a file or folder of the repository."""
        file = ROOT / path
        if not file.exists():
            raise SystemExit(f"expected a file of the repository, got a link to {path}; correct the link")
        page = self.homes[path] = f"source/{path}/index.md" if file.is_dir() else f"source/{path}.md"
        if file.is_dir():
            names = sorted(p.name for p in file.iterdir() if p.is_file() and p.suffix in LANGUAGES)
            text, base = "\n".join(f"- [{name}](/{path}/{name})" for name in names), path
        elif file.suffix == ".md":
            page = self.homes[path] = f"source/{path}"
            text, base = re.sub(r"\A# .*\n", "", file.read_text()), Path(path).parent.as_posix()
        else:
            fence, text = "``````", file.read_text().rstrip("\n")
            self.pages[page] = f"{_HEAD}# {path}\n\n{fence}{LANGUAGES[file.suffix]}\n{text}\n{fence}\n"
            return
        self.pages[page] = f"{_HEAD}# {path}\n\n{self._resolved(text, base, page)}\n"


# Pages of source text would crowd out the others in a search.
_HEAD = "---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n"
