"""The commands of the command line."""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from genai_fast import atomic_files, config
from genai_fast.cli import labelled
from genai_fast.cli.checks import at_least, check_parent, check_seed, opened, replaced_note
from genai_fast.cli.codes import run_compress, run_decompress  # noqa: F401
from genai_fast.cli.images import run_inpaint, run_interpolate, run_reconstruct, run_sample, run_translate, run_upscale  # noqa: F401
from genai_fast.contract import offers
from genai_fast.cpu import tune_cpu
from genai_fast.data.text import cleaning
from genai_fast.errors import UsageError
from genai_fast.evaluation import key
from genai_fast.models.common.protocol import Draws, Reconstructs, Translates, Upscales
from genai_fast.models.registry import RECIPES
from genai_fast.runs import text_generation
from genai_fast.runs.audio_task import AudioTask
from genai_fast.runs.run import CONFIG, Trained, new_folder, saved_settings, train, with_codes
from genai_fast.runs.text_task import TextTask
from genai_fast.runs.wave_task import WaveTask
from genai_fast.spelling import spelled
from genai_fast.terminal import command, printable, say
from genai_fast.training import distributed


def run_train(options: argparse.Namespace) -> int:
    kind, given = RECIPES[options.recipe].config, dict(options.settings)
    for name in ("init", "codes"):
        if name in given:
            given[name] = _run_or_file(given[name], options.out)
    if options.name and Path(options.name).is_relative_to(options.out):  # as messages and file names in a shell have it
        options.name = str(Path(options.name).relative_to(options.out))
    resume = options.resume
    if resume:
        if options.name is None:
            raise UsageError("--resume: expected the run's name as well; remedy: --run NAME")
        # torchrun starts the same command again after a failure: the first time there is no run yet.
        resume = not dist.is_torchelastic_launched() or (options.out / options.name / CONFIG).exists()
    if resume:
        settings = saved_settings(options.recipe, options.out / options.name, given)
    else:
        settings = config.build(kind, with_codes(options.recipe, given), "settings")
    settings = replace(settings, init=_run_or_file(settings.init, options.out))
    default = f"{options.recipe}-{Path(settings.data).stem}"
    folder = options.out / options.name if options.name else new_folder(options.out, default)
    with tune_cpu(), distributed.processes(settings):
        result = train(options.recipe, settings, folder, resume=resume)
        if distributed.first():
            _say(options.recipe, result)
    return 0


def _run_or_file(init: str, out: Path) -> str:
    """What --init means: a path, or the name of a run in `out`."""
    return str(out / init) if init and not Path(init).exists() and (out / init).exists() else init


def _say(recipe: str, result: Trained) -> None:
    """What has come of it, and what can be done with it."""
    folder = result.folder
    figures = result.record.get("validation", {})
    done = "trained" if result.record else "all epochs were already done"
    say(f"{folder}: " + (f"on held-out data:\n{key.as_text(figures)}" if figures else done), sys.stdout)
    best = result.record.get("best")
    if best and best != result.record["step"]:
        say(f"best on held-out data after step {best}: kept; --best selects it in the command below", sys.stdout)
    if isinstance(result.task, TextTask):
        prompt = [] if RECIPES[recipe].feed == "sequences" else ["--prompt", "The"]
        say(f"next: {command('generate', folder, *prompt, '--max-tokens', 200)}", sys.stdout)
    elif isinstance(result.task, (AudioTask, WaveTask)):
        say(f"next: {command('sample', folder, '--count', 16, '--seed', 1, '--out', 'samples.wav')}", sys.stdout)
    elif offers(result.model, Draws):
        say(f"next: {command('sample', folder, '--count', 64, '--seed', 1, '--out', 'grid.png')}", sys.stdout)
    elif offers(result.model, Reconstructs):
        say(f"next: {command('reconstruct', folder, '--count', 12, '--out', 'reconstructed.png')}", sys.stdout)
    elif offers(result.model, Upscales):
        say(f"next: {command('upscale', folder, 'PICTURE', '--out', 'upscaled.png')}", sys.stdout)
    elif offers(result.model, Translates):
        source = result.config.data
        say(f"next: {command('translate', folder, '--to', 'b', '--data', source, '--out', 'translated')}", sys.stdout)


def run_generate(options: argparse.Namespace) -> int:
    check_seed(options.seed)
    style = text_generation.Style(
        options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed,
        tuple(map(_form, options.stop)), not options.no_repeats, spelled(options.weights), options.min_p,
        options.repetition_penalty,
    )  # fmt: skip
    prompts = _prompts(options)
    if options.out is not None:
        check_parent(options.out)
    run = opened(options)
    if run.tokenizer is None:
        raise UsageError(f"{run.folder}: expected a run of a text model, got one of {run.recipe}; remedy: sample")
    draft = opened(argparse.Namespace(folder=options.draft, best=options.best)) if options.draft else None
    if draft and (draft.tokenizer is None or draft.tokenizer.digest != run.tokenizer.digest):
        raise UsageError(f"--draft: expected a run with the tokenizer of {run.folder}, got another")
    records = []
    shown = printable if sys.stdout.isatty() else str  # a model may write what a terminal obeys
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"--- {shown(prompt)}")
        print(shown(prompt) if run.model.continues else "", end="", flush=True)
        pieces = []
        for piece in text_generation.write(run.model, run.tokenizer, prompt, style, draft and draft.model):
            print(shown(piece), end="", flush=True)
            pieces.append(piece)
        print()
        records.append(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False) + "\n")
    if options.out is not None:
        atomic_files.write_text(options.out, "".join(records))
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None and options.prompts is not None:
        raise UsageError("expected --prompt TEXT or --prompts FILE, got both")
    if options.prompts is None:
        if options.prompt == "":
            raise UsageError("--prompt: expected a text, got an empty one; remedy: omit it, or pass a word")
        return [_form(options.prompt or "")]
    try:
        found = cleaning.decode(options.prompts.read_bytes())
    except cleaning.UnreadableError as error:
        raise UsageError(f"--prompts: {options.prompts}: {error}") from error
    if found.replaced:
        raise UsageError(f"--prompts: {options.prompts}: expected UTF-8, got other bytes from byte {found.first} on")
    prompts = [line for line in _form(found.text).split("\n") if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts: {options.prompts}: expected one prompt per line, got an empty file")
    return prompts


def _form(text: str) -> str:
    """As the text that a model is trained on, but for white space at both ends."""
    return cleaning.clean(f".{text}.")[1:-1]


def run_export(options: argparse.Namespace) -> int:
    from genai_fast.runs import export

    check_parent(options.out)
    one_file = options.out.suffix == ".safetensors"
    if options.out.suffix and not one_file:
        raise UsageError(
            f"--out: expected the name of a .safetensors file, or of a folder for weights and script, got {options.out}"
        )
    if one_file and options.onnx:
        raise UsageError(f"--onnx: expected the name of a folder in --out, got {options.out}; remedy: --out FOLDER")
    transformers = options.format == "hf"
    if transformers and (one_file or options.onnx):
        raise UsageError("--format hf: expected the name of a folder in --out, and no --onnx; remedy: --out FOLDER")
    if not one_file and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UsageError(f"--out: expected a new or empty folder, got {options.out}; remedy: another name")
    run, replaced = opened(options), replaced_note(options.out)
    network = export.network_of(run, options.to)
    if one_file:
        export.write_weights(run, options.out, options.to)
        use = f'load it with model.load_state_dict(safetensors.torch.load_file("{options.out}"))'
    elif transformers:
        export.write_hugging_face(run, options.out)
        use = f'load it with AutoModelForCausalLM.from_pretrained("{options.out}")'
    else:
        export.write_folder(run, options.out, onnx=options.onnx, to=options.to)
        use = f"next: {shlex.join([sys.executable, str(options.out / export.SCRIPT), '--help'])}"
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{options.out}{replaced}: {type(network).__name__} of {run.folder}, {parameters:,} parameters; {use}")
    return 0


def run_augment_study(options: argparse.Namespace) -> int:
    return labelled.study(options)


def run_tune(options: argparse.Namespace) -> int:
    from genai_fast import autotune
    from genai_fast.cli import tune

    at_least("--batch", options.batch, 1)
    if options.forget:
        print(f"{autotune.file()}: {autotune.clear()} choices forgotten")
        if not options.models:
            return 0
    if not options.models:
        raise UsageError("MODEL: expected one or more, got none; remedy: such as dcgan-64-generator, or --forget")
    if autotune.pinned():
        raise UsageError("choices are pinned; remedy: unset GENAI_FAST_DETERMINISTIC")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {options.device}: {str(error).splitlines()[0]}") from error
    if options.out is not None:
        check_parent(options.out)
    chosen, bf16 = {}, options.bf16 or options.precision in ("bfloat16", "bf16")
    how = {"batch": options.batch, "device": device, "bf16": bf16, "channels_last": options.channels_last}
    for model, shape in [tune.load(name, options.input, options.own) for name in options.models]:
        chosen |= tune.tune(model, shape, **how)
    if options.out is not None:
        atomic_files.write_text(options.out, tune.markdown(autotune.machine(device), chosen))
    print(tune.text(chosen))
    return 0


def run_profile(options: argparse.Namespace) -> int:
    from genai_fast.profiling import command

    return command.run(options)


def run_doctor(options: argparse.Namespace) -> int:
    from genai_fast.cli import doctor

    report = doctor.examine()
    print(doctor.as_json(report) if options.json else doctor.as_text(report))
    return 0


def _demo(name: str, options: argparse.Namespace) -> int:
    from genai_fast.cli import demo

    with tune_cpu():
        getattr(demo, name)(options.out, options.epochs)
    return 0


run_demo, run_demo_gan, run_demo_text = (partial(_demo, name) for name in ("run", "run_gan", "run_text"))
