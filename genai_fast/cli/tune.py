"""The fastest implementation of each convolution of a model, measured before the model is used."""

import textwrap
from collections.abc import Sequence

import torch
from torch import nn

from genai_fast import autotune, imports
from genai_fast.errors import UsageError
from genai_fast.models import MODELS
from genai_fast.swap import fuse

_WIDTH = 100  # columns of the text


def load(name: str, sizes: str | None, arguments: Sequence[str] = ()) -> tuple[nn.Module, tuple[int, ...]]:
    """The model and the shape of one input, for a name in MODELS, `module:factory` or `file.py:factory`.

    Raises UsageError: no such model, file or factory; it returns no module; the input's shape is missing or invalid.
    """
    if name in MODELS:
        make, shape = MODELS[name]
        return make(), shape if sizes is None else _shape(sizes)
    if ":" not in name:
        raise UsageError(
            f"MODEL: expected one of {', '.join(MODELS)}, or MODULE:FACTORY or FILE.py:FACTORY, got {name!r}"
        )
    if sizes is None:
        raise UsageError("--input: expected the shape of one input without the batch, such as 3x64x64")
    model = imports.load(name, arguments)()
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL: expected {name} to give an nn.Module, got {type(model).__name__}")
    return model, _shape(sizes)


def _shape(sizes: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input: expected sizes such as 3x64x64, got {sizes!r}")
    return shape


def tune(
    model: nn.Module, shape: tuple[int, ...], *, batch: int, device: torch.device, bf16: bool = False,
    channels_last: bool = False,
) -> dict[str, autotune.Choice]:  # fmt: skip
    """Run a model in training mode, with and without an input gradient, and in evaluation mode; returns the choices.

    Args:
        model: it is fused and moved to the device.
        shape: of one input, without the batch.
        batch: batch size; the choices hold for it.
        bf16: run under autocast to bfloat16.
        channels_last: convert model and input to channels_last.

    Raises: RuntimeError if choices are pinned (`GENAI_FAST_DETERMINISTIC=1`).
    """
    if autotune.pinned():
        raise RuntimeError("tune: choices are pinned; remedy: unset GENAI_FAST_DETERMINISTIC")
    autotune.forget()
    model = fuse(model).to(device)
    x = torch.randn(batch, *shape, device=device)
    if channels_last and x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for training, gradient in ((True, False), (True, True), (False, False)):
            model.train(training)
            with torch.set_grad_enabled(training):
                model(x.requires_grad_(gradient))
    return autotune.chosen(device)


def text(chosen: dict[str, autotune.Choice]) -> str:
    """For a terminal: the verdict; then a paragraph per convolution: its implementation, why, the measured times."""
    gains = [t[_default(t)] / t[name] for name, t in chosen.values() if t and name != _default(t)]
    verdict = f"{len(chosen)} convolutions, {len(gains)} of them faster than by default"
    lines = [verdict + (f" (by up to {max(gains):.2f} x)" if gains else ""), f"choices are kept in {autotune.file()}"]
    for key, (name, times) in chosen.items():
        measured = ", ".join(f"{other} {time:.0f} us" for other, time in times.items())
        choice = f"    {name}: {_why(name, times)}" + (f" ({measured})" if measured else "")
        for line in (key, choice):
            lines += textwrap.wrap(line, _WIDTH, subsequent_indent="        ", break_long_words=False)
    return "\n".join(lines)


def _default(times: dict[str, float]) -> str:
    return "torch" if "torch" in times else next(iter(times), "")


def _why(name: str, times: dict[str, float]) -> str:
    if not times:
        return "the only implementation that serves it"
    default = _default(times)
    if name != default:
        return f"{times[default] / times[name]:.2f} x {default}"
    return f"no other takes less than {autotune.MARGIN:.0%} of its time"


def table(chosen: dict[str, autotune.Choice]) -> list[tuple[str, ...]]:
    """Header and rows: each convolution, its implementation, why that one, and the measured times."""
    names = list(dict.fromkeys(name for choice in chosen.values() for name in choice.microseconds))
    rows = [("convolution", "implementation", "why", *(f"{name} us" for name in names))]
    for key, (name, times) in chosen.items():
        shown = (f"{times[n]:.0f}" if n in times else "-" for n in names)
        rows.append((key, name, _why(name, times), *shown))
    return rows


def markdown(machine: str, chosen: dict[str, autotune.Choice]) -> str:
    """The choices as a document with one table."""
    header, *rows = (f"| {' | '.join(row)} |" for row in table(chosen))
    rule = "| --- " * header.count(" | ") + "| --- |"
    return "\n".join(["# The implementation of each convolution", "", machine, "", header, rule, *rows, ""])
