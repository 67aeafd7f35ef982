"""The command line: what it takes; genai_fast.cli.commands does it."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from genai_fast import __version__
from genai_fast.cli.examples import EXAMPLES
from genai_fast.config import types
from genai_fast.errors import UsageError
from genai_fast.terminal import Steady, say

_PROFILE = """\
Clocks the training step of a recipe, or of your own loop, in up to three variants: eager PyTorch, torch.compile and
genai_fast; says where the time goes and what to change.

Your own loop: FILE.py:FUNCTION, where FUNCTION returns
  a function that runs one training step, called again and again,
  or (that function, samples a step),
  or an iterator that runs one step a next(): a loop like yours needs only `yield` at the end of its step; the loading
  of its data is inside. It may yield the step's samples, as an int: `yield len(x)`.
FUNCTION may have these parameters:
  prepare   model = prepare(model) once, before the optimizer and the first step: as it is for eager, compiled for
            compile, genai_fast.fuse(model) for fused; --compare needs it. With --precision bf16 the model's forward
            runs under autocast and gives float32 back.
  batch     what --batch says
  device    what --device says, or cuda where there is one
The file sees sys.argv as `python FILE.py` would; arguments for it come last, after --.
"""

# Of settings in --help; those of a recipe itself are its model's.
_GROUPS = {
    "data": "data strict validation size flip crop rotate jitter tokenizer vocabulary block",
    "optimizer": "epochs batch_size lr lr_discriminator warmup decay beta1 beta2 weight_decay clip accumulate",
    "run": "init precision tf32 seed threads device sync_bn shard log_every checkpoint_every keep tensorboard"
    " grid_every quality_every sample_every",
}
_GROUP_OF = {name: title for title, names in _GROUPS.items() for name in names.split()}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 for the user's mistakes, 128 + n for signal n (130 for Ctrl-C)."""
    prog = "genai-fast"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options = _options(sys.argv[1:] if arguments is None else list(arguments))
            prog = options.parser.prog
            from genai_fast.cli import commands  # with torch: mistakes and --help do not wait for it

            return getattr(commands, f"run_{options.command.replace('-', '_')}")(options)
    except BrokenPipeError:  # `genai-fast generate ... | head`
        return 128 + signal.Signals.SIGPIPE
    except (UsageError, OSError) as error:
        say(f"{prog}: {error}")
        return 2
    except MemoryError as error:
        say(f"{prog}: out of memory{f': {error}' if str(error) else ''}")
        return 2
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
            say(f"{prog}: {str(interrupt) or 'interrupted'}")
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    finally:
        Steady(sys.stdout).flush()


def _options(arguments: list[str]) -> argparse.Namespace:
    """What the arguments mean, `own` those after -- for a file that a command runs; ends the process if nothing."""
    own: list[str] = []
    if "--" in arguments and arguments[0] in ("profile", "tune"):
        place = arguments.index("--")
        arguments, own = arguments[:place], arguments[place + 1 :]
    options, unknown = parser_of("train" in arguments).parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = [flag for action in options.parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(flag, flags, 1, cutoff=0.7)
        options.parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    options.own = own
    return options


def parser_of(recipes: bool = True) -> argparse.ArgumentParser:
    """The parser of every command; that of `train` can do without its recipes, which import torch."""
    parser = _Parser(prog="genai-fast", description="Fused kernels for generative models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"genai-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", allow_abbrev=False)
    kinds = train.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, recipe in _recipes().items() if recipes else ():
        p = kinds.add_parser(name, help=recipe.summary, description=recipe.summary, allow_abbrev=False)
        p.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML; flags go over them")
        p.add_argument("--run", dest="name", metavar="NAME", help="name of the run's folder; default: RECIPE-DATA")
        p.add_argument("--out", type=Path, default=Path("runs"), help="where runs lie; default: %(default)s")
        p.add_argument("--resume", action="store_true", help="go on with the run that --run names")
        groups = {title: p.add_argument_group(title) for title in ("data", "model", "optimizer", "run")}
        for f in fields(recipe.config):
            kind = types(recipe.config)[f.name]
            switch = {"action": argparse.BooleanOptionalAction}
            value = {"type": kind, "metavar": "|".join(f.metadata["choices"]) or f.name.upper()}
            groups[_GROUP_OF.get(f.name, "model")].add_argument(
                f"--{f.name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                help=f"{f.metadata['help']}; default: {f.default}",
                **(switch if kind is bool else value),
            )

    sample = _of_a_run(commands, "sample", "draw samples: a grid, or a folder of pictures")
    sample.add_argument("--count", type=int, default=64, help="how many; default: %(default)s")
    sample.add_argument(
        "--out",
        type=Path,
        default=Path("grid.png"),
        help="a PNG file for a grid, or a new folder for a picture each; default: %(default)s",
    )
    interpolate = _of_a_run(commands, "interpolate", "draw the way from one latent to another")
    interpolate.add_argument("--pairs", type=int, default=8, help="of latents, a row each; default: %(default)s")
    interpolate.add_argument("--steps", type=int, default=10, help="pictures in a row; default: %(default)s")
    interpolate.add_argument("--out", type=Path, default=Path("interpolation.png"), help="default: %(default)s")
    inpaint = _of_a_run(commands, "inpaint", "repair pictures with a variational autoencoder")
    inpaint.add_argument("--data", required=True, metavar="DATA", help="pictures to repair, as `train` takes them")
    inpaint.add_argument("--count", type=int, default=8, help="how many of them; default: %(default)s")
    inpaint.add_argument(
        "--box", metavar="LEFT,TOP,WIDTH,HEIGHT", help="what is missing, in pixels of the model's images"
    )
    inpaint.add_argument("--mask", type=Path, metavar="FILE", help="or: a picture that is white where they miss")
    inpaint.add_argument("--steps", type=int, default=200, help="of the search for z; default: %(default)s")
    inpaint.add_argument("--out", type=Path, default=Path("inpainted.png"), help="default: %(default)s")
    what = "draw pictures, and what an autoencoder makes of them"
    reconstruct = _of_a_run(commands, "reconstruct", what, draws=False)
    reconstruct.add_argument(
        "--data", default="", metavar="DATA", help="as `train` takes it; default: the run's, what was held out of it"
    )
    reconstruct.add_argument("--count", type=int, default=12, help="how many; default: %(default)s")
    reconstruct.add_argument("--out", type=Path, default=Path("reconstructed.png"), help="default: %(default)s")
    generate = _of_a_run(commands, "generate", "write text behind a prompt", draws=False)
    generate.add_argument("--prompt", metavar="TEXT", help="how it begins; default: the model begins by itself")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="or: a text file with a prompt a line")
    generate.add_argument("--out", type=Path, metavar="FILE.jsonl", help='also there, {"prompt", "text"} a line')
    generate.add_argument("--max-tokens", type=int, default=200, help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest; default: %(default)s")
    generate.add_argument("--top-k", type=int, default=50, help="among so many tokens, 0: all; default: %(default)s")
    generate.add_argument("--top-p", type=float, default=0.95, help="of so much probability; default: %(default)s")
    generate.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    generate.add_argument(
        "--weights",
        default="float32",
        choices=("float32", "bfloat16", "bf16", "int8"),
        help="of a GPT on a CPU: fewer bits are faster and less exact; default: %(default)s",
    )
    generate.add_argument("--no-repeats", action="store_true", help="leave out sentences that came before")
    export = _of_a_run(commands, "export", "write the weights for use in plain PyTorch", draws=False)
    export.add_argument(
        "--out",
        type=Path,
        default=Path("weights.safetensors"),
        help="a .safetensors file, or a new folder for weights and a plain PyTorch script; default: %(default)s",
    )
    export.add_argument("--onnx", action="store_true", help="also as ONNX, in that folder")

    tune = commands.add_parser(
        "tune",
        help="measure the fastest path of each convolution of a model",
        allow_abbrev=False,
        description="Measures the paths of every convolution, for training and evaluation, and remembers the fastest.",
    )
    tune.add_argument(
        "models", nargs="+", metavar="MODEL", help="such as dcgan-64-generator, or MODULE:FACTORY, FILE.py:FACTORY"
    )
    tune.add_argument("--input", metavar="SIZES", help="shape of one input without the batch, such as 3x64x64")
    tune.add_argument("--batch", type=int, default=64, help="inputs at a time; default: %(default)s")
    tune.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    tune.add_argument("--bf16", action="store_true", help="the same as --precision bfloat16")
    tune.add_argument("--precision", choices=("float32", "bfloat16", "bf16"), help="of autocast; default: float32")
    tune.add_argument("--channels-last", action="store_true", help="model and input in channels_last")
    tune.add_argument("--out", type=Path, metavar="FILE.md", help="write the table there too, as Markdown")

    _add_profile(commands)

    doctor = commands.add_parser("doctor", help="versions, devices, and which backend serves which op")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")

    for name, what in (
        ("demo", "train two VAEs on handwritten digits in a minute"),
        ("demo-gan", "train a DCGAN on handwritten digits in some minutes"),
        ("demo-text", "train a GPT on Python's own documentation in some minutes"),
    ):
        demo = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        demo.add_argument("--out", type=Path, default=Path("runs"), help="where runs lie; default: %(default)s")
        demo.add_argument("--epochs", type=int, default=None, help="fewer or more of them")
    for name, one in commands_of(parser).items():
        one.set_defaults(parser=one)
        recipe = _recipes().get(name.removeprefix("train ")) if recipes else None
        if lines := recipe.examples if recipe else EXAMPLES.get(name):
            one.epilog = "examples:\n" + "".join(f"  {line}\n" for line in lines)
            one.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _recipes() -> dict[str, Any]:
    from genai_fast.models.registry import RECIPES

    return RECIPES


def _add_profile(commands: Any) -> None:
    what = "where the time of a training step goes: eager, compiled and fused, a recipe's or your own loop's"
    profile = commands.add_parser(
        "profile",
        help=what,
        description=_PROFILE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    profile.add_argument("model", metavar="MODEL", help="a recipe of `train`, or FILE.py:FUNCTION or MODULE:FUNCTION")
    profile.add_argument("--compare", metavar="VARIANTS", help="of eager,compile,fused; default: eager,fused")
    profile.add_argument("--batch", type=int, help="samples a step; default: the recipe's, or your function's")
    profile.add_argument(
        "--precision", choices=("float32", "bfloat16", "bf16"), help="default: float32, or as your loop has it"
    )
    profile.add_argument("--data", default="", help="a recipe's, as `train` takes it; default: one synthetic batch")
    profile.add_argument("--device", help="default: cuda if there is one, else cpu")
    profile.add_argument(
        "--seconds", type=float, default=10.0, help="on the clock, for each variant; default: %(default)g"
    )
    profile.add_argument(
        "--out", type=Path, metavar="DIR", help="a new folder for the report and its traces; default: profile-NAME"
    )
    profile.add_argument("--json", action="store_true", help="print the figures as JSON rather than the table")


def commands_of(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parser and all below it, by the words that lead to them: "", "train", "train vae", ..."""
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, one in action.choices.items():
                found |= commands_of(one, f"{name} {word}".strip())
    return found


def _of_a_run(commands: Any, name: str, what: str, draws: bool = True) -> argparse.ArgumentParser:
    """A command on a run; one that draws has a seed and, for conditional models, a class."""
    parser = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    parser.add_argument("folder", metavar="RUN", help="a run: its folder, or its name under runs")
    parser.add_argument("--best", action="store_true", help="its best checkpoint on held-out data, not the newest")
    if draws:
        parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
        parser.add_argument(
            "--class", dest="label", metavar="NAME", help="of a conditional model; default: each in turn"
        )
    return parser


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    say(f"warning: {message}")
