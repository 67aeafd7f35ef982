"""The command line's parser; genai_fast.cli.commands runs the commands."""

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

from genai_fast import __version__, config
from genai_fast.cli.examples import EXAMPLES
from genai_fast.errors import UsageError
from genai_fast.models.commands import COMMANDS
from genai_fast.terminal import Steady, command, say

_PROFILE = """\
Times the training step of a recipe, or of your own loop, in up to three variants (eager PyTorch, torch.compile and
genai_fast), and reports where the time goes and what to change. With --generate it times generation: the latency of a
token, images or sounds a second.

Your own loop: FILE.py:FUNCTION, where FUNCTION returns
  a function that runs one training step and is called repeatedly,
  or (that function, samples per step),
  or an iterator that runs one step per next(): put `yield` at the end of your loop's step, and data loading is measured
  too. It may yield the number of samples in the step, as an int: `yield len(x)`.
FUNCTION may have these parameters:
  prepare   call model = prepare(model) once, before the optimizer and the first step: it returns the model unchanged
            for eager, compiled for compile, and genai_fast.fuse(model) for fused; --compare needs it. With
            --precision bf16 the model's forward runs under autocast and returns float32.
  batch     the value of --batch
  device    the value of --device, or cuda if available
The file sees sys.argv as under `python FILE.py`; arguments for it come last, after --.
"""

# What the program says alone: commands to begin with, and what for.
_GUIDE = (
    ("doctor", "what works on this machine"),
    ("demo", "a VAE trained on digits, in two minutes"),
    ("train dcgan --data PHOTOS", "on pictures; or gpt --data BOOK.txt"),
    ("train dcgan --help", "its settings; all models: train --help"),
    ("sample runs/dcgan-PHOTOS", "pictures drawn by what was trained"),
    ("profile train.py:train", "where your training step's time goes"),
    ("--help", "all commands"),
)

# Of settings in --help; those of a recipe itself are its model's.
_GROUPS = {
    "data": "data data_b strict validation size flip crop rotate zoom jitter tokenizer vocabulary block"
    " rate seconds trim mels n_fft hop scale",
    "model": "init",
    "optimizer": "epochs batch_size optimizer lr lr_discriminator warmup decay beta1 beta2 weight_decay clip"
    " accumulate seed",
    "machine": "device threads precision tf32 sync_bn shard",
    "output": "log_every checkpoint_every keep grid_every quality_every sample_every tensorboard",
}
_GROUP_OF = {name: title for title, names in _GROUPS.items() for name in names.split()}


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {command(*self.prog.split()[1:], '--help')}\n")

    def add_default(self, flag: str, default: Any, help: str, **more: Any) -> None:
        """An argument of the default's type, whose help names the default."""
        kind = Path if isinstance(default, Path) else type(default)
        self.add_argument(flag, type=kind, default=default, help=f"{help}; default: %(default)s", **more)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for usage errors, 128 + n for signal n (130 for Ctrl-C)."""
    prog = "genai-fast"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {message}")
            if not (sys.argv[1:] if arguments is None else arguments):
                print(_guide())
                return 0
            options = _options(sys.argv[1:] if arguments is None else list(arguments))
            prog = options.parser.prog
            if options.command == "train":
                options.settings = _settings(options)
            from genai_fast.cli import commands  # imports torch, which errors and --help do not wait for

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
        if os.environ.get("RANK", "0") == "0":  # only one of torchrun's processes reports
            say(f"{prog}: {str(interrupt) or 'interrupted'}")
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    finally:
        Steady(sys.stdout).flush()


def _guide() -> str:
    program = command()
    lines = [f"  {program} {words}".ljust(len(program) + 30) + what for words, what in _GUIDE]
    return "\n".join([f"genai_fast {__version__}: fused kernels for generative models", "", *lines])


def _options(arguments: list[str]) -> argparse.Namespace:
    """The parsed arguments, with those after -- (for a file that a command runs) in `own`; exits on an error."""
    own: list[str] = []
    if "--" in arguments and arguments[0] in ("profile", "tune"):
        place = arguments.index("--")
        arguments, own = arguments[:place], arguments[place + 1 :]
    options, unknown = parser_of().parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = [flag for action in options.parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(flag, flags, 1, cutoff=0.7)
        options.parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    options.own = own
    return options


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that a file and flags give, which have been checked.

    Raises: ConfigError.
    """
    kind = COMMANDS[options.recipe].config
    file = config.read(options.config, options.recipe) if options.config else {}
    if file:
        config.build(kind, file, str(options.config))  # its mistakes in its own name
    flags = {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}
    config.build(kind, {**file, **flags}, "settings")
    return {**file, **flags}


def parser_of() -> argparse.ArgumentParser:
    """The parser of every command; nothing here imports torch, which takes seconds."""
    parser = _Parser(prog="genai-fast", description="Fused kernels for generative models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"genai-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", allow_abbrev=False)
    kinds = train.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, recipe in COMMANDS.items():
        p = kinds.add_parser(name, help=recipe.summary, description=recipe.summary, allow_abbrev=False)
        p.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML; flags override them")
        p.add_argument("--resume", action="store_true", help="resume the run named by --run")
        groups = {title: p.add_argument_group(title) for title in _GROUPS}
        groups["output"].add_argument(
            "--run", dest="name", metavar="NAME", help="name of the run's folder; default: RECIPE-DATA"
        )
        groups["output"].add_argument(
            "--out", type=Path, default=Path("runs"), help="folder that holds the runs; default: %(default)s"
        )
        for f in fields(recipe.config):
            kind = config.types(recipe.config)[f.name]
            switch = {"action": argparse.BooleanOptionalAction}
            value = {"type": kind, "metavar": "|".join(f.metadata["choices"]) or f.name.upper()}
            groups[_GROUP_OF.get(f.name, "model")].add_argument(
                f"--{f.name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                help=f"{f.metadata['help']}; default: {'none' if f.default == '' else f.default}",
                **(switch if kind is bool else value),
            )

    sample = _of_a_run(commands, "sample", "draw samples: pictures in a grid or a folder; sounds in a file or a folder")
    sample.add_argument("--count", type=int, help="number of samples; default: 64 pictures or 16 sounds")
    what = "of stylegan2, how far styles may lie from their mean, 0 to 1: less variety, fewer failures; default: 1"
    sample.add_argument("--truncation", type=float, metavar="PSI", help=what)
    sample.add_argument(
        "--out",
        type=Path,
        help="a PNG file for a grid, or a new folder for one file per picture; of sounds a WAV file, with a PNG"
        " file of spectrograms next to it, or a folder; default: grid.png or samples.wav, or a free number",
    )
    sample.add_argument(
        "--classes",
        metavar="all|NAMES",
        help="write --count pictures of each of these classes, such as 0,3, into a folder with a subfolder for each,"
        " which `train` reads; for a conditional model of images",
    )
    interpolate = _of_a_run(commands, "interpolate", "interpolate between pairs of latents, or two sounds")
    interpolate.add_argument(
        "--between", nargs=2, type=Path, metavar=("A", "B"), help="two sound files, for a run of a model of sounds"
    )
    interpolate.add_argument(
        "--pairs", type=int, default=8, help="pairs of latents, one row each; default: %(default)s"
    )
    what = "one dimension of z from -3 to 3 per row instead: of a VAE those that tell most of held-out pictures"
    interpolate.add_argument("--traverse", action="store_true", help=what)
    interpolate.add_argument("--steps", type=int, default=10, help="pictures per row; default: %(default)s")
    what = "PNG file, of sounds WAV; default: interpolation.png or .wav, or a free number"
    interpolate.add_argument("--out", type=Path, help=what)
    inpaint = _of_a_run(commands, "inpaint", "fill in missing parts of pictures with a variational autoencoder")
    inpaint.add_argument(
        "--data", required=True, metavar="DATA", help="pictures to repair, in any form that `train` reads"
    )
    inpaint.add_default("--count", 8, "number of pictures")
    inpaint.add_argument(
        "--box", metavar="LEFT,TOP,WIDTH,HEIGHT", help="the missing part, in pixels of the model's images"
    )
    inpaint.add_argument(
        "--mask", type=Path, metavar="FILE", help="or: a picture that is white where pixels are missing"
    )
    inpaint.add_argument("--steps", type=int, default=200, help="optimization steps for z; default: %(default)s")
    inpaint.add_argument("--out", type=Path, help="PNG file; default: inpainted.png, or a free number")
    what = "draw pictures or sounds and their reconstructions by an autoencoder"
    reconstruct = _of_a_run(commands, "reconstruct", what, draws=False)
    reconstruct.add_argument(
        "--data",
        default="",
        metavar="DATA",
        help="pictures or sounds, in any form that `train` reads; default: the run's held-out data",
    )
    reconstruct.add_argument("--count", type=int, default=12, help="number of them; default: %(default)s")
    what = "PNG file, of sounds WAV; default: reconstructed.png or .wav, or a free number"
    reconstruct.add_argument("--out", type=Path, help=what)
    what = "write pictures as the codes of an autoencoder, by a run of autoencoder, vae or conv-vae"
    compress = _of_a_run(commands, "compress", what, draws=False)
    compress.add_argument(
        "--data", default="", metavar="DATA", help="pictures, in any form that `train` reads; default: the run's"
    )
    compress.add_argument("--count", type=int, help="number of pictures, the first ones; default: all")
    compress.add_argument(
        "--bits", type=int, default=8, choices=(8, 16, 32), help="of each number of a code; default: %(default)s"
    )
    compress.add_argument("--out", type=Path, help="a .safetensors file; default: codes.safetensors, or a free number")
    decompress = _of_a_run(commands, "decompress", "turn codes of `compress` into pictures again", draws=False)
    decompress.add_argument("codes", type=Path, metavar="CODES", help="a file that `compress` wrote")
    what = "a new folder, or a PNG file for a grid; default: decompressed, or a free number"
    decompress.add_argument("--out", type=Path, help=what)
    what = "translate pictures by a run of cyclegan or pix2pix"
    translate = _of_a_run(commands, "translate", what, draws=False)
    translate.add_argument(
        "--data", required=True, metavar="DATA", help="pictures to translate, in any form that `train` reads"
    )
    translate.add_argument(
        "--to", default="b", choices=("a", "b"), help="the set that they are to be of; default: %(default)s"
    )
    translate.add_argument("--count", type=int, help="number of pictures, the first ones; default: all")
    translate.add_argument(
        "--out",
        type=Path,
        help="a new folder for one file per picture, or a PNG file for a grid of pictures and translations; default:"
        " translated, or a free number",
    )
    what = "enlarge a picture by a run of srresnet or srgan"
    upscale = _of_a_run(commands, "upscale", what, draws=False)
    upscale.add_argument("picture", type=Path, metavar="PICTURE", help="a picture of any size")
    upscale.add_argument("--out", type=Path, help="PNG file; default: upscaled.png, or a free number")
    generate = _of_a_run(commands, "generate", "continue a prompt", draws=False)
    generate.add_argument("--prompt", metavar="TEXT", help="text to continue; default: none")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="or: a text file with one prompt per line")
    generate.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help='also write {"prompt", "text"} there, one per line'
    )
    generate.add_default("--max-tokens", 200, "tokens to write, at most")
    generate.add_default("--temperature", 0.8, "0: always the most likely token")
    generate.add_default("--top-k", 50, "sample from the k most likely tokens, 0: all")
    generate.add_default("--top-p", 0.95, "nucleus probability")
    generate.add_default("--min-p", 0.0, "least probability of a token, as a fraction of the likeliest's")
    generate.add_default("--repetition-penalty", 1.0, "divide logits of tokens in the text so far by this")
    generate.add_default("--seed", 1, "random seed")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated"
    )
    what = "precision of gpt's and llama's weights on a CPU: fewer bits are faster, less exact; default: %(default)s"
    precisions = ("float32", "bfloat16", "bf16", "int8")
    generate.add_argument("--weights", default="float32", choices=precisions, help=what)
    generate.add_argument("--draft", metavar="RUN", help="a smaller run that proposes tokens: the same text, sooner")
    generate.add_argument("--no-repeats", action="store_true", help="leave out sentences that were written before")
    export = _of_a_run(commands, "export", "export the weights for plain PyTorch", draws=False)
    what = "a .safetensors file, or a new folder for weights and a plain PyTorch script"
    export.add_default("--out", Path("weights.safetensors"), what)
    export.add_argument(
        "--to", default="b", choices=("a", "b"), help="of a CycleGAN, the generator of this set; default: %(default)s"
    )
    what = "of that folder; hf: as transformers reads it (gpt, llama); default: %(default)s"
    export.add_argument("--format", default="plain", choices=("plain", "hf"), help=what)
    export.add_argument("--onnx", action="store_true", help="also write ONNX into that folder")

    what = "train small classifiers with and without a conditional model's images, and compare their accuracies"
    study = _of_a_run(commands, "augment-study", what, draws=False)
    study.add_default("--count", 100, "images to generate of each class")
    study.add_default("--seeds", 5, "classifiers to train on each set of images")
    study.add_default("--steps", 400, "training steps of a classifier")
    study.add_default("--seed", 1, "random seed of the generated images")
    study.add_argument("--out", type=Path, metavar="FILE.json", help="also write the accuracies there")

    tune = commands.add_parser(
        "tune",
        help="find the fastest implementation of each convolution of a model",
        allow_abbrev=False,
        description="Measures each convolution's implementations, in training and evaluation, and saves the fastest.",
    )
    tune.add_argument(
        "models", nargs="*", metavar="MODEL", help="such as dcgan-64-generator, or MODULE:FACTORY, FILE.py:FACTORY"
    )
    tune.add_argument(
        "--forget", action="store_true", help="first forget all choices, such as those made on a busy machine"
    )
    tune.add_argument("--input", metavar="SIZES", help="shape of one input without the batch, such as 3x64x64")
    tune.add_default("--batch", 64, "batch size")
    tune.add_argument("--device", default=None, help="default: cuda if available, else cpu")
    tune.add_argument("--bf16", action="store_true", help="the same as --precision bfloat16")
    tune.add_argument(
        "--precision", choices=("float32", "bfloat16", "bf16"), help="autocast precision; default: float32"
    )
    tune.add_argument("--channels-last", action="store_true", help="model and input in channels_last")
    tune.add_argument("--out", type=Path, metavar="FILE.md", help="also write a table there, as Markdown")

    _add_profile(commands)

    doctor = commands.add_parser("doctor", help="versions, devices, and the backend of each op")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    for name, what in (
        ("demo", "train two VAEs on handwritten digits, 5,000 of MNIST's, in a minute or two"),
        ("demo-gan", "train a DCGAN on handwritten digits, 5,000 of MNIST's, in a few minutes"),
        ("demo-text", "train a GPT on Python's own documentation in a few minutes"),
    ):
        demo = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        demo.add_default("--out", Path("runs"), "folder that holds the runs")
        demo.add_argument("--epochs", type=int, default=None, help="passes over the data; default: the demo's own")
    for name, one in commands_of(parser).items():
        one.set_defaults(parser=one)
        recipe = COMMANDS.get(name.removeprefix("train "))
        if lines := recipe.examples if recipe else EXAMPLES.get(name):
            one.epilog = "examples:\n" + "".join(f"  {line}\n" for line in lines)
            one.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _add_profile(commands: Any) -> None:
    what = "profile a training step, of a recipe or your own loop: eager, compiled and fused"
    profile = commands.add_parser("profile", help=what, description=_PROFILE, allow_abbrev=False)
    profile.add_argument("model", metavar="MODEL", help="a recipe of `train`, or FILE.py:FUNCTION or MODULE:FUNCTION")
    profile.add_argument(
        "--compare",
        metavar="VARIANTS",
        help="some of eager,compile,fused,tuned (your own loop, fused, under tune_cpu); default: all but compile",
    )
    profile.add_argument(
        "--batch",
        help="samples per step; several, as 16,32,64: where throughput stops growing; default: the recipe's, or your"
        " function's",
    )
    profile.add_argument(
        "--generate",
        action="store_true",
        help="profile generation instead: MODEL is a recipe or the folder of a run; --batch 1,8 as many at once",
    )
    profile.add_argument(
        "--precision", choices=("float32", "bfloat16", "bf16"), help="default: float32, or that of your loop"
    )
    profile.add_argument(
        "--data", default="", help="data for a recipe, in any form that `train` reads; default: one synthetic batch"
    )
    profile.add_argument("--device", help="default: cuda if available, else cpu")
    profile.add_argument("--seconds", type=float, default=10.0, help="measured time per variant; default: %(default)g")
    profile.add_argument(
        "--out", type=Path, metavar="DIR", help="a new folder for the report and its traces; default: profile-NAME"
    )
    profile.add_argument("--json", action="store_true", help="print JSON instead of the table")


def commands_of(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parser and its subparsers by command: "", "train", "train vae", ..."""
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, one in action.choices.items():
                found |= commands_of(one, f"{name} {word}".strip())
    return found


def _of_a_run(commands: Any, name: str, what: str, draws: bool = True) -> argparse.ArgumentParser:
    """A command that takes a run; one that draws has a seed and, for conditional models, a class."""
    parser = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    parser.add_argument("folder", metavar="RUN", help="a run's folder, or its name in runs/")
    parser.add_argument("--best", action="store_true", help="use the best checkpoint on held-out data, not the newest")
    if draws:
        parser.add_default("--seed", 1, "random seed")
        what = "class to draw, for a conditional model; default: each in turn"
        parser.add_argument("--class", dest="label", metavar="NAME", help=what)
    return parser
