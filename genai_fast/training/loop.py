"""The loop: epochs, validation, metrics.jsonl, checkpoints, interrupts."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import nn

from genai_fast import atomic_files, data
from genai_fast.config import Config
from genai_fast.contract import image_traits
from genai_fast.errors import UsageError
from genai_fast.training import checkpoint, distributed, parallel
from genai_fast.training.batches import Feed
from genai_fast.training.meter import Meter, Metrics, Progress, over_all, rates
from genai_fast.training.progress import display
from genai_fast.training.schedule import Schedule
from genai_fast.training.step import Step, autocast
from genai_fast.training.tensorboard import Board

METRICS = "metrics.jsonl"
_HANGUP = getattr(signal, "SIGHUP", None)  # of a terminal that closes; Windows has none
_AT_ONCE = ("not finite", "no comparison of samples with held-out images")  # kinds of warnings that need not last
MOST_SKIPPED = 10  # steps in a row that skipped an update for NaN: then training stops


class TrainingStopped(UsageError):
    """Training cannot continue: the loss is no longer a number."""


class TrainingInterrupted(KeyboardInterrupt):
    """A signal to stop (`number`), after the step at hand was finished and a checkpoint written."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Look(NamedTuple):
    """What was found when an epoch's end was looked at."""

    figures: dict[str, float]
    warnings: list[str]
    text: str = ""  # by the model, to be shown


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Feed,
    validation: Feed,
    config: Config,
    run: Path,
    *,
    about: dict[str, Any] | None = None,
    resume: dict[str, Any] | None = None,
    after_epoch: Callable[[int, dict[str, float]], Look] | None = None,
    board: Board | None = None,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Train until `config.epochs`; leave metrics.jsonl and checkpoints in folder `run`.

    metrics.jsonl holds one JSON object a line, losses in nats a sample: {"kind": "step", "epoch", "step",
    "samples_per_second", "data_wait", <the model's losses>} every `config.log_every` steps and at the end of an
    epoch, and {"kind": "epoch", "epoch", "step", "samples_per_second", "data_wait", "step_ms": {"p50", "p95", "max"},
    "skipped", "train": {<losses>}, "validation": {<losses>}, "best", "warnings": [...]} after it; of running text
    "tokens_per_second" too. Epochs and steps count from 1. "best" is the step after which held-out data was best so far
    (lowest "loss", else Fréchet distance): its checkpoint is kept beside the `config.keep` newest. Warnings are of what
    has lasted two epochs. data_wait is the share of the time that was spent waiting for data; step_ms are milliseconds
    from step to step on the host, since the epoch began or went on (on CUDA the host runs ahead and waits at times:
    medians mean something, single steps little); skipped counts updates left out because a loss or gradient was not
    finite.

    SIGINT (Ctrl-C), SIGTERM or SIGHUP ends training after the step at hand with a checkpoint; a second one at once.

    Args:
        about: JSON data stored with each checkpoint.
        resume: what `checkpoint.restore` returned, to resume from there.
        after_epoch: number of the epoch and its mean losses -> figures for "validation", warnings, and a text to show;
            None: the figures of `evaluate`.
        board: gets all records too.
        stream: where the progress bar goes, or a line an epoch if it is no terminal; None: stderr.

    Returns:
        The last epoch's record.

    Raises:
        TrainingStopped: losses stayed infinite or NaN; the batch is in folder `run`.
        TrainingInterrupted: by a signal; a checkpoint of the last step is in folder `run`.
        CheckpointError: `resume` is of another kind.
    """
    at = _progress(resume, train.steps)
    train.rows = distributed.chooser(image_traits(model).n_critic)
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    schedule = Schedule(optimizer, config, config.epochs * train.steps, model)
    record: dict[str, Any] = {}
    warned: set[str] = set()
    recipe = (about or {}).get("recipe", "RECIPE")
    shown = False  # anything of the losses

    def save() -> None:
        whole = parallel.gathered(model, optimizer)
        if distributed.first():
            metrics.synchronize()
            checkpoint.save(
                run, *whole, at.step, asdict(at), about or {}, config.keep, at.best, training_step=step.state_dict()
            )
        distributed.most(0)  # none leaves before it is there

    stream = stream or (sys.stderr if distributed.first() else io.StringIO())
    with (
        parallel.averaging(model),
        Metrics(run / METRICS if distributed.first() else None, at.step, board) as metrics,
        display(stream, config.epochs * train.samples) as screen,
        _signals() as stop,
    ):
        how = {"clip": config.clip, "precision": config.precision, "accumulate": config.accumulate}
        step = parallel.step_of(model, optimizer, **how)
        if resume is not None and resume["training_step"]:
            step.load_state_dict(resume["training_step"])
        while at.epoch < config.epochs:
            model.train()
            screen.begin(at.epoch + 1, config.epochs)
            meter = Meter(at, step.skipped()[0])
            batches = train.epoch(at.epoch, at.batch)
            # A thread pays where the device computes by itself; on the CPU it would only compete with the step.
            with contextlib.closing(data.ahead(batches, pin=True) if on_cuda else batches) as fed:
                for batch in meter.waiting(fed):
                    schedule.set(at.step)
                    left = train.samples - at.batch * train.size
                    samples = len(batch[0]) if train.rows is None else min(train.size, left)
                    with distributed.sharing(samples):
                        losses = step(*batch)
                        schedule.after(losses)
                        meter.add(losses, samples)
                    at.batch, at.step = at.batch + 1, at.step + 1
                    last = at.batch == train.steps
                    if last or at.step % config.log_every == 0:
                        terms, rate, wait = meter.latest(), meter.rate(), meter.wait()
                        _check(step, batch, train.names, at, run)
                        place = {"kind": "step", "epoch": at.epoch + 1, "step": at.step}
                        metrics.write(**place, **rates(train, rate), data_wait=wait, **terms)
                        screen.terms(terms, rates(train, rate))
                    elif not shown:
                        screen.terms(meter.latest(), rates(train, meter.rate()))
                    shown = True
                    screen.step(at.epoch * train.samples + at.batch * train.samples // train.steps)
                    asked = _asked(stop)
                    due = config.checkpoint_every and at.step % config.checkpoint_every == 0
                    if (due or asked) and not last:
                        meter.store(at, step.skipped()[0])
                        _check(step, batch, train.names, at, run, saving=True)
                        save()
                        _leave(asked, run, at, recipe)
            meter.store(at, step.skipped()[0])
            _check(step, batch, train.names, at, run, saving=True)
            means = meter.means()
            distributed.same_buffers(model)
            if after_epoch is None:
                figures, warnings, text = Look(evaluate(model, validation, config), [])
            else:
                figures, warnings, text = after_epoch(at.epoch + 1, means)
            ailing = [message.partition(":")[0] for message in warnings]
            # Only what lasts: the first epochs of every GAN look ill.
            warnings = [m for m, kind in zip(warnings, ailing, strict=True) if kind in (*at.ailing, *_AT_ONCE)]
            if at.skipped:
                warnings.append(
                    f"updates skipped: {at.skipped} in epoch {at.epoch + 1}, whose loss or gradient was not finite"
                )
            best, lowest = _better(figures, at)
            record = {"kind": "epoch", "epoch": at.epoch + 1, "step": at.step}
            record |= rates(train, train.samples / at.seconds) | {"data_wait": at.waited / at.seconds}
            record |= {"step_ms": meter.step_ms(), "skipped": at.skipped, "train": means, "validation": figures}
            record |= {"best": best or None, "warnings": warnings}
            metrics.write(**record)
            at = Progress(epoch=at.epoch + 1, step=at.step, ailing=ailing, best=best, lowest=lowest)
            save()
            screen.epoch(record, config.epochs)
            screen.sample(text)
            kinds = {message.partition(":")[0]: message for message in warnings}
            for kind in kinds.keys() - warned:  # again only after it has recovered
                screen.warn(kinds[kind])
            warned = set(kinds)
            distributed.same_noise(device)  # the first process may have drawn pictures
            asked = _asked(stop)
            if at.epoch < config.epochs:
                _leave(asked, run, at, recipe)
    return record


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Collects the names of signals that ask to stop; the second one acts as usual."""
    stop: list[str] = []

    def listen(number: int, frame: Any) -> None:
        stop.append(signal.Signals(number).name)
        if distributed.size() == 1:  # torchrun passes on what the processes may have got from elsewhere already
            restore()

    with _handled(listen) as restore:
        yield stop


@contextlib.contextmanager
def finishing(run: Path, recipe: str) -> Iterator[None]:
    """Inside, after the last epoch, a signal to stop ends at once, and says what is there.

    Raises: TrainingInterrupted.
    """

    def end(number: int, frame: Any) -> None:
        raise TrainingInterrupted(
            f"{run}: stopped by {signal.Signals(number).name} after its last epoch, before its last pictures; draw"
            f" them with {checkpoint.resume_command(run, recipe)}",
            number,
        )

    with _handled(end):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[Callable[[], None]]:
    """Inside, the handler gets the signals that ask to stop; yields what ends that before."""
    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield lambda: None
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, _HANGUP) if n is not None]
    before = {number: signal.getsignal(number) for number in numbers}
    if before.get(_HANGUP) == signal.SIG_IGN:  # under nohup
        del before[_HANGUP]

    def restore() -> None:
        for number, previous in before.items():
            signal.signal(number, previous)

    for number in before:
        signal.signal(number, handler)
    try:
        yield restore
    finally:
        restore()


def _asked(stop: list[str]) -> int:
    """The signal by which this process, or any that trains with it, was asked to stop; 0: none."""
    return distributed.most(int(signal.Signals[stop[0]]) if stop else 0)


def _leave(asked: int, run: Path, at: Progress, recipe: str) -> None:
    if asked:
        raise TrainingInterrupted(
            f"{run}: stopped by {signal.Signals(asked).name} after step {at.step} (epoch {at.epoch + 1}) with a"
            f" checkpoint; go on with {checkpoint.resume_command(run, recipe)}",
            signal.Signals(asked),
        )


@torch.no_grad()
def evaluate(model: nn.Module, feed: Feed, config: Config) -> dict[str, float]:
    """The model's losses, means over all samples, in evaluation mode; the same noise every time."""
    device = next(model.parameters()).device
    training, sums, samples = model.training, None, 0
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for batch in feed.all():
            batch = tuple(x.to(device) for x in batch)
            with distributed.part_of(batch) as own:
                with autocast(device, config.precision):
                    losses = model.training_step(*own)
                losses = distributed.joint(losses, _weight(own, feed, losses))
            weight = _weight(batch, feed, losses)
            weighted = torch.stack(tuple(losses)).double() * weight
            sums, samples = weighted if sums is None else sums + weighted, samples + weight
    model.train(training)
    return over_all(dict(zip(losses._fields, (sums / samples).tolist(), strict=True)))


def _better(figures: dict[str, float], at: Progress) -> tuple[int, float]:
    """Step and figure of the best epoch so far, by the loss on held-out data, or without one by Fréchet distance."""
    figure = figures.get("loss", figures.get("frechet_distance", math.nan))
    if math.isfinite(figure) and (not at.best or figure < at.lowest):
        return at.step, figure
    return at.best, at.lowest


def _weight(batch: tuple[torch.Tensor, ...], feed: Feed, losses: Any) -> int:
    """What a batch's losses are means over: its samples, or its tokens."""
    if "targets" in feed.names and "tokens" not in losses._fields:
        return int((batch[feed.names.index("targets")] >= 0).sum())
    return len(batch[0])


def _progress(resume: dict[str, Any] | None, steps: int) -> Progress:
    """Where a run resumes whose epochs have this many steps."""
    if resume is None:
        return Progress()
    given = resume["progress"]
    try:
        at = Progress(**given)
        sound = (
            all(type(x) is int and x >= 0 for x in (at.epoch, at.batch, at.step, at.skipped, at.best))
            and all(type(x) in (int, float) and math.isfinite(x) for x in (at.seconds, at.waited, at.lowest, *at.sums))
            and all(isinstance(x, str) for x in at.ailing)
            and at.batch < steps
            and at.step == resume["step"]
        )
    except TypeError:
        sound = False
    if not sound:
        raise checkpoint.CheckpointError(
            f"state.json: progress: expected such as {Progress(step=resume['step'])}, batch < {steps}, got {given}"
        )
    return at


def _check(
    step: Step, batch: tuple[torch.Tensor, ...], names: tuple[str, ...], at: Progress, run: Path, *,
    saving: bool = False,
) -> None:  # fmt: skip
    """Stop if updates are skipped again and again; before saving, also if anything in the model is not finite."""
    _, row = step.skipped()
    broken = parallel.not_finite(step.model) if saving else []
    if row < MOST_SKIPPED and not broken:
        return
    path = run / f"batch-{at.step:09d}.safetensors"
    tensors = {name: x.cpu().contiguous() for name, x in zip(names, batch, strict=False)}
    if distributed.first():
        with atomic_files.whole(path) as hidden:
            atomic_files.write_tensors(hidden, tensors)
    reason = (
        f"{broken[0]} is not finite" if broken else f"{row} steps in a row had a loss or gradient that is not finite"
    )
    raise TrainingStopped(
        f"{run}: training stopped at step {at.step} (epoch {at.epoch + 1}): {reason}. The batch is in {path.name}, the"
        f" last checkpoint is from before. Remedy: a smaller --lr, or --clip 1"
    )
