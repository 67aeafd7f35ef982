"""The command line: genai-fast train | sample | tune | doctor | demo."""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from genai_fast import __version__
from genai_fast.errors import UsageError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 for the user's mistakes, 130 for an interrupt."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag, options.flags, 1)
        options.parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return options.run(options)
    except UsageError as error:
        print(f"{options.parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{options.parser.prog}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    # Here rather than at the top: `genai-fast --help` need not wait for torch.
    from genai_fast.training.config import types
    from genai_fast.training.recipes import RECIPES

    parser = _Parser(prog="genai-fast", description="Fused kernels for generative models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"genai-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", allow_abbrev=False)
    recipes = train.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, recipe in RECIPES.items():
        p = recipes.add_parser(name, help=recipe.summary, description=recipe.summary, allow_abbrev=False)
        p.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML; flags go over them")
        p.add_argument("--run", dest="name", metavar="NAME", help="name of the run's folder; default: RECIPE-DATA")
        p.add_argument("--out", type=Path, default=Path("runs"), help="where runs lie; default: %(default)s")
        p.add_argument("--resume", action="store_true", help="go on with the run that --run names")
        for f in fields(recipe.config):
            p.add_argument(
                f"--{f.name.replace('_', '-')}",
                type=types(recipe.config)[f.name],
                default=argparse.SUPPRESS,
                metavar="|".join(f.metadata["choices"]) or f.name.upper(),
                help=f"{f.metadata['help']}; default: {f.default}",
            )
        _finish(p, _train)

    sample = commands.add_parser("sample", help="draw a grid of samples", allow_abbrev=False)
    sample.add_argument("folder", metavar="RUN", help="a run: its folder, or its name under runs")
    sample.add_argument("--count", type=int, default=64, help="how many; default: %(default)s")
    sample.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG file; default: %(default)s")
    _finish(sample, _sample)

    tune = commands.add_parser(
        "tune", help="measure the fastest path of each convolution of a model", allow_abbrev=False,
        description="Measures the paths of every convolution, for training and evaluation, and remembers the fastest.",
    )  # fmt: skip
    tune.add_argument(
        "models", nargs="+", metavar="MODEL", help="such as dcgan-64-generator, or MODULE:FACTORY, FILE.py:FACTORY"
    )
    tune.add_argument("--input", metavar="SIZES", help="shape of one input without the batch, such as 3x64x64")
    tune.add_argument("--batch", type=int, default=64, help="inputs at a time; default: %(default)s")
    tune.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    tune.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    tune.add_argument("--channels-last", action="store_true", help="model and input in channels_last")
    tune.add_argument("--out", type=Path, metavar="FILE.md", help="write the table there too, as Markdown")
    _finish(tune, _tune)

    doctor = commands.add_parser("doctor", help="versions, devices, and which backend serves which op")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    _finish(doctor, _doctor)

    demo = commands.add_parser("demo", help="train two VAEs on handwritten digits in a minute", allow_abbrev=False)
    demo.add_argument("--out", type=Path, default=Path("runs"), help="where runs lie; default: %(default)s")
    demo.add_argument("--epochs", type=int, default=None, help="fewer or more of them")
    _finish(demo, _demo)
    return parser


def _finish(parser: argparse.ArgumentParser, run: Any) -> None:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    parser.set_defaults(run=run, parser=parser, flags=flags)


def _train(options: argparse.Namespace) -> int:
    from genai_fast.training import config
    from genai_fast.training.recipes import RECIPES, saved_settings, train

    kind = RECIPES[options.recipe].config
    flags = {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}
    if options.resume:
        if options.name is None:
            raise UsageError("--resume: expected the run's name as well; remedy: --run NAME")
        if options.config is not None:
            raise UsageError("--resume goes on with the run's own settings; remedy: leave --config out")
        settings = saved_settings(options.recipe, options.out / options.name, flags)
    else:
        file = config.read(options.config, options.recipe) if options.config else {}
        if file:
            config.build(kind, file, str(options.config))  # its mistakes in its own name
        settings = config.build(kind, {**file, **flags}, "settings")
    default = f"{options.recipe}-{Path(settings.data).stem}"
    folder = options.out / options.name if options.name else new_folder(options.out, default)
    result = train(options.recipe, settings, folder, resume=options.resume)
    losses = ", ".join(f"{name} {value:.2f}" for name, value in result.record.get("validation", {}).items())
    print(f"{folder}: validation {losses or 'as before: all epochs were done'} (nats a sample)")
    print(f"next: genai-fast sample {folder} --count 64 --seed 1 --out grid.png")
    return 0


def new_folder(out: Path, name: str) -> Path:
    """out/name, or out/name-2, -3, ... if that is taken."""
    number, folder = 1, out / name
    while folder.exists():
        number += 1
        folder = out / f"{name}-{number}"
    return folder


def _sample(options: argparse.Namespace) -> int:
    from genai_fast.training import pictures
    from genai_fast.training.recipes import open_run

    if options.count < 1:
        raise UsageError(f"--count: expected at least 1, got {options.count}")
    if not options.out.parent.is_dir():
        raise UsageError(f"--out: expected a file in an existing folder, got {options.out}")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"--seed: expected 0 to 2**63 - 1, got {options.seed}")
    if options.out.suffix.lower() != ".png":
        raise UsageError(f"--out: expected the name of a PNG file, got {options.out}")
    folder = Path(options.folder)
    if not folder.exists() and (Path("runs") / folder).exists():
        folder = Path("runs") / folder
    model, shape = open_run(folder)
    images = model.sample(options.count, seed=options.seed)
    pictures.grid(images.view(-1, *shape), options.out)
    print(f"{options.out}: {options.count} samples of {folder}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    import torch

    from genai_fast import paths, tune

    if options.batch < 1:
        raise UsageError(f"--batch: expected at least 1, got {options.batch}")
    if paths.pinned():
        raise UsageError("choices are pinned; remedy: unset GENAI_FAST_DETERMINISTIC")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {options.device}: {str(error).splitlines()[0]}") from error
    if options.out is not None and not options.out.parent.is_dir():
        raise UsageError(f"--out: expected a file in an existing folder, got {options.out}")
    chosen = {}
    for model, shape in [tune.load(name, options.input) for name in options.models]:
        chosen |= tune.tune(
            model, shape, batch=options.batch, device=device, bf16=options.bf16, channels_last=options.channels_last
        )
    if options.out is not None:
        options.out.write_text(tune.markdown(paths.machine(device), chosen))
    rows = tune.table(chosen)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(chosen)} convolutions; remembered in {paths.file()}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from genai_fast import doctor

    report = doctor.examine()
    print(doctor.as_json(report) if options.json else doctor.as_text(report))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from genai_fast import demo

    demo.run(options.out, options.epochs)
    return 0


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
