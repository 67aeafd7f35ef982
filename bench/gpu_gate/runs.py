"""The stage "runs": what a GPU must prove of one run of one op.

Its numbers, those of its second derivative if the case is small, the same bits twice, and capture as a CUDA graph.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench import clock
from bench.points import fused_backend
from genai_fast import ops
from genai_fast.backends import use_backend
from genai_fast.kernels.common.spec import Tensors
from genai_fast.testing import SECOND_ORDER, Run, assert_matches_reference, assert_second_derivative, every_run

Step = Callable[[], list[torch.Tensor]]
Capture = Callable[[Step], tuple[Callable[[], None], list[torch.Tensor]]]


def step_of(run: Run, inputs: dict[str, Any]) -> Step:
    """Forward and backward of a run on these inputs: outputs, then gradients."""
    function = getattr(ops, run.op.name)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    def step() -> list[torch.Tensor]:
        with use_backend(run.forced):
            outputs = function(**inputs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            grads = []
            if leaves:
                upstream = [torch.ones_like(y) for y in outputs]
                grads = list(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))
        return [x.detach() for x in (*outputs, *grads) if x is not None]

    return step


def inputs_of(run: Run) -> dict[str, Any]:
    return run.case.inputs(Tensors(run.dtype, run.device))


def _same(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    """Bitwise, so that NaN equals NaN."""
    pairs = list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _raising_is_red(check: Callable[..., str | None]) -> Callable[..., str]:
    """A failed launch is as red as a wrong number."""

    @functools.wraps(check)
    def checked(run: Run, *arguments: Any) -> str:
        try:
            return check(run, *arguments) or ""
        except Exception as error:
            return f"{run}: {type(error).__name__}: {error}"[:1000]

    return checked


@_raising_is_red
def numerics(run: Run, right: Callable[[Run], None] = assert_matches_reference) -> str | None:
    """What is wrong with a run's numbers; "" if nothing."""
    right(run)


@_raising_is_red
def determinism(run: Run) -> str:
    """What is wrong when forward and backward run twice on the same inputs; "" if nothing."""
    first, second = (step_of(run, inputs_of(run))() for _ in range(2))
    return "" if _same(first, second) else f"{run}: two runs on the same inputs differ in their bits"


@_raising_is_red
def graph_replay(run: Run, capture: Capture = clock.capture) -> str:
    """What is wrong with the captured graph of a run; "" if nothing.

    New numbers are put into the graph's inputs, so that a replay that does nothing is noticed.
    """
    inputs = inputs_of(run)
    replay, outputs = capture(step_of(run, inputs))
    new = inputs_of(run)
    with torch.no_grad():
        for static, x in zip(tensors(inputs), tensors(new), strict=True):
            if _writable(x):
                static.copy_(x.mul_(0.5) if x.is_floating_point() else x)
    replay()
    replayed = [x.clone() for x in outputs]
    if not _same(replayed, step_of(run, new)()):
        return f"{run}: the replay's numbers differ from eager's"
    if "seed" not in inputs or replayed[0].numel() < 2:
        return ""
    replay, outputs = capture(step_of(run, {**inputs, "seed": None}))
    replay()
    first = outputs[0].clone()
    replay()
    drawn = not torch.isfinite(first).all() or not torch.equal(first, outputs[0])
    return "" if drawn else f"{run}: with seed=None two replays draw the same numbers"


def tensors(inputs: dict[str, Any]) -> list[torch.Tensor]:
    found = [x for value in inputs.values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in found if isinstance(x, torch.Tensor)]


def _writable(x: torch.Tensor) -> bool:
    """No two elements share memory, as those of an expanded tensor do."""
    return all(stride or size < 2 for size, stride in zip(x.shape, x.stride(), strict=True))


def check(run: Run, capture: Capture = clock.capture) -> dict[str, str]:
    """What is wrong with a run, by kind.

    Bits and graphs are checked under PyTorch's default precision: on CUDA that is TF32 for float32 convolutions.
    """
    found = {"numerics": numerics(run)}
    exact = run.dtype is torch.float32 and not run.tf32
    if run.op.double_backward and exact and run.case.name in SECOND_ORDER:
        found["second"] = numerics(run, assert_second_derivative)
    # Not if the reference serves: it may synchronise with the device, which ends a capture.
    if run.backend != "reference" and run.backend == fused_backend(run.op, run.device):
        found |= {"determinism": determinism(run), "graph": graph_replay(run, capture)}
    return {kind: message for kind, message in found.items() if message}


@functools.cache
def _known(device: str) -> dict[str, Run]:
    return {str(run): run for run in every_run((device,))}


def work(name: str, device: str) -> dict[str, Any]:
    return {"failures": check(_known(device)[name], capture_on(device))}


def capture_on(device: str) -> Capture:
    return clock.capture if device == "cuda" else _again


def _again(step: Step) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """Stands in for a capture without a GPU: a replay runs the step again, into the same outputs."""
    outputs = step()

    def replay() -> None:
        for static, fresh in zip(outputs, step(), strict=True):
            static.copy_(fresh)

    return replay, outputs
