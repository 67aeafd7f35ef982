"""What is profiled: a recipe beside its plain PyTorch, or a user's own training loop; each variant as one call."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from genai_fast import data, imports
from genai_fast.config import TextConfig
from genai_fast.errors import UsageError
from genai_fast.models.registry import RECIPES
from genai_fast.profiling.systems import System, of_recipe
from genai_fast.profiling.waiting import Waiting
from genai_fast.runs.run import task_of
from genai_fast.swap import Row, explain, fuse
from genai_fast.training.batches import Feed

EAGER, COMPILE, FUSED, LOOP = "eager", "compile", "fused", "loop"
TUNED = "tuned"  # fused, or the loop as it is, under `tune_cpu`, which is of the whole process
VARIANTS = (EAGER, COMPILE, FUSED, TUNED)
_KNOWN = ("prepare", "batch", "device")  # what a user's function may ask for


class LoopEnded(Exception):
    """A training loop came to its end while it was measured."""


# The class of a network that was prepared, and what fuse leaves alone of it, and why.
Left = tuple[str, list[Row]]


@dataclass(frozen=True)
class Subject:
    """Something with variants, each made by make(variant): runs one step, returns its samples (None: unknown)."""

    name: str
    what: str  # in words
    variants: tuple[str, ...]
    make: Callable[[str], Callable[[], int | None]]
    block: int = 0  # tokens of a sample; 0: samples are counted
    no_wait: str = "unknown, no DataLoader of PyTorch was asked for a batch"  # reported if nothing was waited for
    waiting: Waiting = field(default_factory=Waiting)
    left_alone: list[Left] = field(default_factory=list)  # by fuse, of each network; filled by `make`


def recipe(name: str, device: torch.device, batch: int | None, precision: str, source: str = "") -> Subject:
    """A recipe of `genai-fast train`: its own step as `fused`, the plain script of its model as `eager` and `compile`.

    Args:
        batch: samples a step; None: as the recipe's system has it.
        source: real data, through the recipe's feed; "": one synthetic batch, already on the device.
    """
    system, feed, waiting = of_recipe(name, batch, precision), None, Waiting()
    if source:
        system, feed = _with_data(system, source)
    bf16 = precision == "bfloat16"

    def make(variant: str) -> Callable[[], int]:
        prepare = preparing(variant, bf16)
        step = system.fused(device.type) if variant == FUSED else system.plain(device.type, prepare)
        if feed is None:
            inputs = system.inputs(device.type)
            return lambda: (step(*inputs), len(inputs[0]))[1]
        batches = waiting.timed(_endless(feed, pin=device.type == "cuda"))

        def fed() -> int:
            inputs = tuple(x.to(device, non_blocking=True) for x in next(batches))
            step(*inputs)
            return len(inputs[0])

        return fed

    sizes = "x".join(map(str, system.shape))
    what = f"a step of {system.batch} x {sizes}, {precision}, {'data: ' + source if source else 'a synthetic batch'}"
    return Subject(
        name, what, (EAGER, COMPILE, FUSED), make, system.block, "the batch is synthetic; --data measures it", waiting
    )


def _with_data(system: System, source: str) -> tuple[System, Feed]:
    """The system with what the data asks for, and the data in batches."""
    text = isinstance(system.config, TextConfig)
    size = {"size": system.shape[1]} if hasattr(system.config, "size") else {}
    both = {"data_b": source} if RECIPES[system.recipe].translates else {}
    config = replace(system.config, data=source, **size, **both)
    task = task_of(system.recipe)(system.recipe, config)
    if text:
        system = replace(system, config=config, vocabulary=task.tokenizer.size)
    else:
        about = task.about
        classes = len(about["classes"]) if system.classes else 0
        system = replace(system, config=config, shape=tuple(about["shape"]), classes=classes)
    return system, task.feeds(system.model())[0]


def _endless(feed: Feed, pin: bool) -> Iterator[tuple[torch.Tensor, ...]]:
    for epoch in itertools.count():
        batches = feed.epoch(epoch)
        yield from data.ahead(batches, pin=True) if pin else batches


def own(
    name: str, device: torch.device | None, batch: int | None, bf16: bool, arguments: Sequence[str] = ()
) -> Subject:
    """A user's `FILE.py:FUNCTION` or `MODULE:FUNCTION`.

    FUNCTION returns one of: a callable that runs one training step; that and the samples of a step; an iterator (it
    may be a generator) that runs one step a `next` and may yield the step's samples as an int. It may ask for
    `prepare`, to be called with each network before its first use, `batch` and `device`.

    Raises UsageError: no such function, or one that asks for something else or is not asked for what is given.
    """
    function = imports.load(name, arguments)
    wanted, required = _parameters(name, function)
    if batch is None and "batch" in required:
        raise UsageError(f"--batch: {name} asks for it, got none; remedy: --batch N, or a default in the function")
    for flag, value in (("batch", batch), ("device", device)):
        if value is not None and flag not in wanted:
            raise UsageError(f"--{flag}: {name} takes no `{flag}`; remedy: give it such a parameter, or set it there")
    if bf16 and "prepare" not in wanted:
        raise UsageError(f"--precision: {name} takes no `prepare`; remedy: give it one, or set the precision there")
    left_alone: list[Left] = []
    auto = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make(variant: str) -> Callable[[], int | None]:
        prepare = preparing(variant, bf16, left_alone if variant == FUSED else None)
        values = {"prepare": prepare, "batch": batch, "device": auto}
        given = {k: v for k, v in values.items() if k in wanted and v is not None}
        return _stepper(name, function(**given))

    variants = VARIANTS if "prepare" in wanted else (LOOP, TUNED)
    if auto.type == "cuda":
        variants = tuple(variant for variant in variants if variant != TUNED)
    return Subject(name.rpartition(":")[2], name, variants, make, left_alone=left_alone)


def _parameters(name: str, function: Callable[..., Any]) -> tuple[set[str], list[str]]:
    """Those that we know of, and all that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise UsageError(f"MODEL: {name}: expected a Python function, got {error}") from error
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in open_ended]
    if other := [p for p in required if p not in _KNOWN]:
        raise UsageError(
            f"MODEL: {name}: expected a function without arguments but for {', '.join(_KNOWN)}, got {', '.join(other)}"
        )
    return {p.name for p in parameters if p.name in _KNOWN}, required


def _stepper(name: str, made: Any) -> Callable[[], int | None]:
    samples = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], int):
        made, samples = made
    if isinstance(made, nn.Module) or not (callable(made) or isinstance(made, Iterator)):
        raise UsageError(
            f"{name}: expected it to return a function that runs one training step, (that, samples per step), or an"
            f" iterator that runs one step per next(), got {type(made).__name__} {made!r:.40}; remedy: return the step"
            f" function, or put `yield` at the end of the loop's step"
        )
    if not isinstance(made, Iterator):
        return lambda: (made(), samples)[1]
    done = 0

    def step() -> int | None:
        nonlocal done
        try:
            found = next(made)
        except StopIteration:
            raise LoopEnded(
                f"the loop ended after {done} steps; remedy: more steps in it, such as `while True`"
            ) from None
        done += 1
        return found if isinstance(found, int) and not isinstance(found, bool) else samples

    return step


def preparing(
    variant: str, bf16: bool, left_alone: list[Left] | None = None, mode: str | None = None
) -> Callable[..., nn.Module]:
    """prepare(model, method="forward") -> the same model, in place what the variant makes of it.

    With `bf16` the method runs under autocast to bfloat16 and gives float32 back: losses outside take that. `mode` is
    torch.compile's. `left_alone` gets what fuse leaves alone of each network that it is asked to fuse.
    """

    def prepare(model: nn.Module, method: str = "forward") -> nn.Module:
        if not isinstance(model, nn.Module):
            raise TypeError(f"prepare: expected an nn.Module, got {type(model).__name__}")
        if variant in (FUSED, TUNED):
            if left_alone is not None:
                left_alone.append((type(model).__name__, [row for row in explain(model) if row.reason]))
            fuse(model)
        if bf16:
            _under_autocast(model, method)
        if variant == COMPILE:
            # Not model.compile(): of an nn.Sequential that compiles nothing, and says nothing.
            _with_method(model, method, torch.compile(getattr(type(model), method), mode=mode))
        return model

    return prepare


def _under_autocast(model: nn.Module, method: str) -> None:
    wide = getattr(type(model), method)

    def narrow(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        weight = next(self.parameters(), None)
        with torch.autocast("cpu" if weight is None else weight.device.type, torch.bfloat16):
            found = wide(self, *arguments, **named)
        return torch.utils._pytree.tree_map_only(torch.Tensor, _widened, found)

    _with_method(model, method, narrow)


def _with_method(model: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """By a subclass rather than an attribute of this one object: a deep copy must run its own weights."""
    if name in model.__dict__:
        raise TypeError(f"prepare: expected a model whose {name} is its class's, got one that is replaced")
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, name: function})


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype is torch.bfloat16 else x


def names() -> str:
    """What MODEL may be, in words."""
    return f"one of {', '.join(RECIPES)}, or FILE.py:FUNCTION or MODULE:FUNCTION"
