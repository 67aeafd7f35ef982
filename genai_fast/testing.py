"""The numerics gate: every op x case x dtype x backend against float64, with eager PyTorch's own error as the measure.

    err(kernel, float64 reference) <= 2 err(eager in that dtype, float64 reference) + floor[dtype]

and 3 times for gradients. The error of outputs is max-norm over max-norm, of gradients 2-norm over 2-norm: they flip
by rounding at an activation's kink. On CUDA float32 is multiplied in full here: PyTorch lets convolutions round
the factors to TF32, which a run of its own checks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from genai_fast import ops
from genai_fast.backends import interpreting, unavailable, use_backend
from genai_fast.errors import UsageError
from genai_fast.kernels.common.spec import GRADIENT_FACTOR, OUTPUT_FACTOR, TOLERANCE_FLOOR, Case, OpSpec, Tensors
from genai_fast.precision import float32_products
from genai_fast.registry import OPS

if TYPE_CHECKING:
    from genai_fast.emulator.driver_triton import EmulatedGPU

# Cases that are small enough for derivatives of derivatives.
SECOND_ORDER = (
    "odd_rows", "offset_1", "gaussian_none", "target_gradient", "second_order", "second_order_alone",
    "second_order_eval",
)  # fmt: skip
FEW = 8  # numbers, of which eager may get all right by luck: one more rounding is allowed
AUTOMATIC = "automatic"  # as a run's backend: whatever serves each part of the op
CONVOLUTIONS = ("conv_transpose", "causal_conv1d")  # folders of ops that multiply in TF32 by default
TF32_ROUNDING = 2.0**-10  # of the largest value: a factor has 10 bits, and which rounding is the hardware's affair


@dataclass(frozen=True)
class Run:
    """One op on one case, in one dtype, on one backend and device."""

    op: OpSpec
    case: Case
    dtype: torch.dtype
    backend: str
    device: str
    tf32: bool = False  # float32 convolutions as PyTorch has them by default, not in full

    @property
    def forced(self) -> str | None:
        """For `use_backend`."""
        return None if self.backend == AUTOMATIC else self.backend

    def products(self) -> contextlib.AbstractContextManager[None]:
        """Multiply as the run asks for, inside the block."""
        return float32_products(convolutions="tf32" if self.tf32 else "ieee")

    def __str__(self) -> str:
        precision = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{self.case}-{precision}-{self.backend}-{self.device}"


def every_run(devices: tuple[str, ...] | None = None) -> Iterator[Run]:
    """Every run that this machine can do: CPU, and CUDA where there is one; Triton on CPU tensors if it is interpreted,
    or inside `emulated_gpu`.
    """
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for op in OPS.values():
        for device in devices:
            for backend in op.backends:
                if unavailable(backend, device):
                    continue
                for k, case in enumerate(op.cases):
                    for dtype in _dtypes(op, k, backend, device):
                        yield Run(op, case, dtype, backend, device)
                if op.folder in CONVOLUTIONS and backend == "triton" and (device == "cuda" or not interpreting()):
                    yield Run(op, op.cases[0], torch.float32, backend, device, tf32=True)


def _dtypes(op: OpSpec, case: int, backend: str, device: str) -> tuple[torch.dtype, ...]:
    """Those that the case of that number runs in. Interpreted and emulated Triton takes seconds a run: the emulator has
    every case in float32, and every fourth one in one of the narrow types too; the interpreter, which rounds those
    otherwise than a device, every second one in float32. A GPU runs all.
    """
    if backend == "reference":
        return *op.dtypes, torch.float64
    if backend != "triton" or device != "cpu":
        return op.dtypes
    if interpreting():
        return (torch.float32,) if case % 2 == 0 else ()
    narrow = [dtype for dtype in op.dtypes if dtype is not torch.float32]
    return torch.float32, *(narrow[case // 4 % len(narrow) :][:1] if narrow and case % 4 == 0 else ())


def _flat(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]


def _widen(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64: low precision is rounded to first, then widened."""

    def wide(x: Any) -> Any:
        if isinstance(x, list):
            return [wide(item) for item in x]
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        return x

    return {name: wide(x) for name, x in inputs.items()}


def _differentiable(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}


def _evaluate(op, function, inputs, upstream=None):
    """Outputs and what was updated in place, and the gradients of sum(output * upstream) by input name."""
    outputs = _flat(function(**inputs))
    updated = [inputs[name] for name in op.mutates if inputs.get(name) is not None]
    targets = _differentiable(inputs)
    if upstream is None or not targets:
        return [*outputs, *updated], {}
    differentiable = [(y, u.to(y.dtype)) for y, u in zip(outputs, upstream, strict=False) if y.requires_grad]
    of, incoming = zip(*differentiable, strict=True)
    grads = torch.autograd.grad(of, list(targets.values()), incoming, allow_unused=True)
    zero = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, targets.values(), strict=True)]
    return [*outputs, *updated], dict(zip(targets, zero, strict=True))


def emulated_gpu(arch: int = 90, *, strict: bool = True, keep: bool = True, **options: Any) -> EmulatedGPU:
    """A GPU that needs none: inside, Triton kernels launched on CPU tensors run compiled, checked and counted.

    Each kernel is compiled as for that GPU, up to PTX, and the PTX is executed. Every access is checked to lie inside
    the tensors that the launch was given, and to be aligned; shared and global memory are checked for races, and what
    is asynchronous to have been waited for. Inside, `use_backend("triton")` serves CPU tensors, too. Not checked is
    what ptxas and the hardware do with the PTX; nothing tells how long a kernel takes.

        with emulated_gpu(arch=90) as gpu:
            kernel[grid](x, y, n, BLOCK=1024)
        print(gpu.report())

    Args:
        arch: 80 (A100) or 90 (H100).
        strict: raise at a race and at whatever else is certainly wrong; else it is only reported.
        keep: keep a record of each launch for the report; without it memory stays small in long runs.
        options: `seed` of the order of programs and warps (0: one after another), `check=False` to leave out what is
            slow (races), `max_resident` programs at a time, `budget` of warp instructions a launch.

    Raises:
        UsageError: Triton or a C++ compiler is missing, or Triton interprets in this process (TRITON_INTERPRET).
        KernelFault: from a launch: what the kernel did, with instruction, source line and tensor.
        Unsupported: from a launch: an instruction that is not implemented.
    """
    try:
        from genai_fast.emulator.driver_triton import EmulatedGPU
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UsageError("emulated_gpu: triton is not installed; remedy: pip install triton (Linux only)") from error
    return EmulatedGPU(arch, strict, keep, options)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory reads as NaN, so that an element which a kernel forgot to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _error(x: torch.Tensor, truth: torch.Tensor, order: float) -> float:
    """Relative error in that norm over the elements that are finite in the truth."""
    finite = torch.isfinite(truth)
    x, truth = x.double()[finite], truth[finite]
    if truth.numel() == 0:
        return 0.0
    scale = float(torch.linalg.vector_norm(truth, order))
    return float(torch.linalg.vector_norm(x - truth, order)) / (scale or 1.0)


def _compare(run, name, got, eager, truth, order, factor) -> str:
    if got.shape != truth.shape or got.dtype != eager.dtype:
        return f"{name}: expected {tuple(truth.shape)} {eager.dtype}, got {tuple(got.shape)} {got.dtype}"
    # Infinities and NaN must stand where eager puts them; where eager overflows and float64 does not, either is right.
    kinds = [(torch.isnan(t), torch.isposinf(t), torch.isneginf(t)) for t in (got, eager, truth.to(eager.dtype))]
    for what, mine, theirs, exact in zip(("NaN", "+inf", "-inf"), *kinds, strict=True):
        if bool((mine != theirs).logical_and(mine != exact).any()):
            return (
                f"{name}: {what} where eager has none, or the other way round: {int((mine != theirs).sum())} elements"
            )
    limited = torch.where(torch.isfinite(got) & torch.isfinite(eager), truth, math.nan)
    error, allowed = _error(got, limited, order), factor * _error(eager, limited, order) + TOLERANCE_FLOOR[run.dtype]
    more, _ = run.op.extra_tolerance.get(name, (0.0, ""))
    if truth.numel() < FEW:
        more += TOLERANCE_FLOOR[run.dtype]
    if run.tf32:
        more += TF32_ROUNDING
    return "" if error <= allowed + more else f"{name}: error {error:.3g} against float64, allowed {allowed + more:.3g}"


def assert_matches_reference(run: Run) -> None:
    """Outputs, then each gradient by name, against the float64 reference.

    Raises AssertionError: names the run, and each output or input whose error passes its limit.
    """
    with run.products():
        wrong = _differences(run)
    assert not wrong, f"{run}: " + "; ".join(wrong)


def _differences(run: Run) -> list[str]:
    op = run.op

    def inputs() -> dict[str, Any]:  # new ones each time: an op may update them in place
        return run.case.inputs(Tensors(run.dtype, run.device))

    outputs, _ = _evaluate(op, op.reference, _widen(inputs()))
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(o.shape, generator=generator).to(run.dtype).to(o) for o in outputs]
    truth, truth_grads = _evaluate(op, op.reference, _widen(inputs()), upstream)
    eager, eager_grads = _evaluate(op, op.reference, inputs(), upstream)
    with use_backend(run.forced), poisoned_memory():
        got, got_grads = _evaluate(op, getattr(ops, op.name), inputs(), upstream)

    with torch.no_grad():
        found = [
            _compare(run, f"output {k}", g, e, t, math.inf, OUTPUT_FACTOR)
            for k, (g, e, t) in enumerate(zip(got, eager, truth, strict=True))
        ] + [
            _compare(run, name, g, eager_grads[name], truth_grads[name], 2.0, GRADIENT_FACTOR)
            for name, g in got_grads.items()
        ]
    return [line for line in found if line]


def assert_second_derivative(run: Run) -> None:
    """A gradient penalty through the kernels: d/dx |df/dx|^2 in float32, against the float64 reference.

    Raises AssertionError: a derivative is missing, or differs.
    """
    inputs = run.case.inputs(Tensors(torch.float32, run.device))
    truth = _penalty(run.op.reference, _widen(inputs))
    with use_backend(run.forced), run.products():
        got = _penalty(getattr(ops, run.op.name), inputs)
    for name, x in got.items():
        assert (x is None) == (truth[name] is None), f"{run}: {name}: second derivative: {x} for {truth[name]}"
        if x is not None:
            torch.testing.assert_close(x.double(), truth[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{run}: {m}")


def _penalty(function: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """The gradient of the sum of the gradient's squares, by input name; nothing where the function is linear in all."""
    targets = _differentiable(inputs)
    outputs = [y for y in _flat(function(**inputs)) if y.requires_grad]
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    first = torch.autograd.grad(outputs, list(targets.values()), upstream, create_graph=True, allow_unused=True)
    squares = [(g * g).sum() for g in first if g is not None and g.requires_grad]
    if not squares:
        return {}
    return dict(zip(targets, torch.autograd.grad(sum(squares), list(targets.values()), allow_unused=True), strict=True))
