"""A page for each family of models, from its recipes, and one for the settings that they share."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import Field, fields

import genai_fast.layers
from genai_fast import config, models
from genai_fast.models.commands import FAMILIES
from genai_fast.models.common.recipe import Recipe
from genai_fast.models.registry import RECIPES

# Settings that recipes share, most general first.
SHARED: dict[type[config.Config], str] = {
    config.Config: "Every recipe", config.ImageConfig: "Images", config.TranslationConfig: "Image translation",
    config.AudioConfig: "Sounds", config.WaveformConfig: "Waveforms", config.TextConfig: "Text",
}  # fmt: skip
# Samples in docs/pictures/<name>.png, and the commands that made them.
PICTURES = {
    "vae": (
        "genai-fast train vae --data mnist --epochs 20",
        "genai-fast sample runs/vae-mnist --count 16 --out vae.png",
    ),
    "audio-vae": (
        "genai-fast train audio-vae --data spoken-digits --decay cosine",
        "genai-fast sample runs/audio-vae-spoken-digits --count 16 --out audio-vae.wav",
    ),
}


def pages() -> dict[str, str]:
    """Path in the site -> Markdown, with links from the root of the repository."""
    return {
        "models/index.md": _index(),
        **{f"models/{family}.md": _family(family) for family in FAMILIES},
        "models/settings.md": _shared_settings(),
        "layers.md": _layers(),
    }


def _recipes(family: str) -> list[Recipe]:
    return [*importlib.import_module(f"genai_fast.models.{family}.recipe").RECIPES]


def _title(family: str) -> str:
    text = inspect.getdoc(importlib.import_module(f"genai_fast.models.{family}")) or family
    text = text.rstrip(".").removeprefix("The ")
    return text[0].upper() + text[1:]


def _index() -> str:
    rows = [
        f"| [`{recipe.name}`](/docs/models/{family}.md#{recipe.name}) | {recipe.command.summary} |"
        for family in FAMILIES
        for recipe in _recipes(family)
    ]
    return "\n".join((
        "# Models\n",
        f"`genai-fast train NAME` trains these {len(RECIPES)}; the other commands work on the run that it makes.",
        "Every model has a twin in plain PyTorch with the same keys, which `genai-fast export` writes out.\n",
        "| name | what it is |", "| --- | --- |", *rows,
        "\nWhat all of them share is on the page of [shared settings](/docs/models/settings.md). How to",
        "[add a model](/genai_fast/models/README.md).\n",
    ))  # fmt: skip


def _family(family: str) -> str:
    recipes = _recipes(family)
    sources = dict.fromkeys(source for recipe in recipes for source in _sources(family, recipe))
    parts = [f"# {_title(family)}\n", *(_recipe(family, recipe) for recipe in recipes)]
    if sources:
        parts.append("## References\n\n" + "\n".join(f"- {source}" for source in sources) + "\n")
    folder = f"/genai_fast/models/{family}"
    parts.append(
        f"## Source\n\n[model.py]({folder}/model.py), [plain.py]({folder}/plain.py) (the twin in plain PyTorch),"
        f" [settings.py]({folder}/settings.py), [recipe.py]({folder}/recipe.py)\n"
    )
    return "\n".join(parts)


def _recipe(family: str, recipe: Recipe) -> str:
    kind = recipe.config
    base = next(shared for shared in reversed(SHARED) if issubclass(kind, shared))
    inherited = {f.name: f for f in fields(base)}
    own = [f for f in fields(kind) if f.name not in inherited or inherited[f.name].default != f.default]
    examples = "\n".join(f"$ {line}" for line in recipe.command.examples)
    return f"""## `{recipe.name}`

{recipe.command.summary[0].upper()}{recipe.command.summary[1:]}: `{recipe.model.__name__}`{_exported(recipe)}.

```console title="takes minutes"
{examples}
```

{_picture(recipe)}{_kind_of_data(recipe)}

Its own settings, and those whose default differs from the [shared ones](/docs/models/settings.md#{_anchor(base)}):

{_table(own)}

{_measured(recipe)}
"""


def _exported(recipe: Recipe) -> str:
    name = recipe.model.__name__
    return f" (`genai_fast.models.{name}`)" if getattr(models, name, None) is recipe.model else ""


def _picture(recipe: Recipe) -> str:
    if recipe.name not in PICTURES:
        return ""
    commands = "\n".join(f"$ {command}" for command in PICTURES[recipe.name])
    picture = f"![Samples of {recipe.name}](/docs/pictures/{recipe.name}.png)"
    return f'{picture}\n\nSamples, not selected, made by\n\n```console title="takes minutes"\n{commands}\n```\n\n'


def _kind_of_data(recipe: Recipe) -> str:
    if recipe.feed:
        return f"It trains on text, fed as {recipe.feed} ([batches](/genai_fast/models/README.md))."
    if recipe.sounds:
        return "It trains on sounds, as log-mel spectrograms of clips."
    if recipe.waves:
        return "It trains on sounds as they are, in windows of mu-law codes; the measure is bits a held-out sample."
    if recipe.translates:
        return f"It trains on two sets of images{', in pairs' if recipe.pairs else ''}."
    return f"It trains on images{', and needs labels' if recipe.labelled else ''}."


def _measured(recipe: Recipe) -> str:
    profile = f"`genai-fast profile {recipe.name}` measures a training step on your machine."
    if not recipe.benches:
        return profile
    rows = [
        f"| {bench.name} | {bench.batch} x {' x '.join(map(str, bench.shape))} | {'GPU' if bench.gpu else 'CPU, GPU'} |"
        for bench in recipe.benches
    ]
    return "\n".join((
        f"{profile} The benchmark (`bench/bench_training.py`) compares it with the plain twin as:\n",
        "| system | batch | measured on |", "| --- | --- | --- |", *rows,
    ))  # fmt: skip


def _sources(family: str, recipe: Recipe) -> list[str]:
    """The papers that docstrings of the family's classes name, the trained model's first."""
    modules = [importlib.import_module(f"genai_fast.models.{family}.model"), inspect.getmodule(recipe.model)]
    classes = [recipe.model, *(k for m in modules for k in vars(m).values() if inspect.isclass(k))]
    found = []
    for kind in classes:
        if kind.__module__.startswith("genai_fast.models.") and "common" not in kind.__module__:
            text = inspect.cleandoc(kind.__doc__ or "")
            for source in re.findall(r"^Source: (.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE):
                found += " ".join(source.split()).rstrip(".").split("; ")
    return found


def _shared_settings() -> str:
    parts = [
        "# Shared settings\n\nEach is a flag of `genai-fast train NAME`, and a key of the TOML file that `--config`"
        " names; flags override the file.\n"
    ]
    seen: set[str] = set()
    for kind, title in SHARED.items():
        known = {f.name: f for base in kind.__mro__[1:] if base in SHARED for f in fields(base)}
        own = [f for f in fields(kind) if f.name not in known or known[f.name].default != f.default]
        parts.append(f"## {title}\n\n{_table(own)}\n")
        seen |= {f.name for f in own}
    return "\n".join(parts)


def _anchor(kind: type[config.Config]) -> str:
    return SHARED[kind].lower().replace(" ", "-")


def _table(settings: list[Field]) -> str:
    if not settings:
        return "None."
    rows = [
        f"| `--{f.name.replace('_', '-')}` | {_default(f.default)} | {_allowed(f)} | {f.metadata['help']} |"
        for f in settings
    ]
    return "\n".join(("| flag | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows))


def _default(value: object) -> str:
    if value == "":
        return "none"
    return ("on" if value else "off") if isinstance(value, bool) else f"`{value}`"


def _allowed(f: Field) -> str:
    low, above, high = (f.metadata[name] for name in ("low", "above", "high"))
    if f.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in f.metadata["choices"])
    if isinstance(f.default, bool):
        return "on, off"
    if isinstance(f.default, str):
        return "text"
    if low > float("-inf") and high < 1e9:
        return f"{low:g} to {high:g}"
    bounds = [f"> {above:g}"] * (above > float("-inf")) + [f">= {low:g}"] * (low > float("-inf"))
    return ", ".join(bounds + [f"<= {high:g}"] * (high < 1e9)) or "number"


def _layers() -> str:
    names = genai_fast.layers.__all__
    homes = {name: getattr(genai_fast.layers, name).__module__ for name in names}
    return "# Layers\n\nDrop-ins for modules of `torch.nn`: same constructors and state-dict keys.\n\n" + "\n\n".join(
        f"::: {homes[name]}.{name}\n    options:\n      members: [forward]" for name in names
    )
