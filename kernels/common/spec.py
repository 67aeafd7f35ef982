"""What an op folder says about itself, once. Tests, benchmarks, the compile gate and the op table read it from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest error, beyond twice eager's own, that counts as right: about four units in the last place of the
# accumulated value. One table for every op; an op that needs more says so in its spec, with the reason.
TOLERANCE_FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@dataclass
class Tensors:
    """Makes a case's tensors: same numbers on every device, drawn in float32 on the CPU, then rounded to `dtype`."""

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(20240229))

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, grad: bool = True) -> torch.Tensor:
        return self._finish(torch.randn(shape, generator=self.generator) * scale + mean, grad)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, grad: bool = False) -> torch.Tensor:
        return self._finish(torch.rand(shape, generator=self.generator) * (high - low) + low, grad)

    def values(self, data: Sequence[Any], grad: bool = True) -> torch.Tensor:
        return self._finish(torch.tensor(data, dtype=torch.float32), grad)

    def seed(self, value: int) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.int64, device=self.device)

    def laid_out(self, layout: str, *shape: int, **draw: float) -> torch.Tensor:
        """`normal` in memory that is "contiguous", "channels_last", "strided" (half of it used) or "transposed"."""
        x = self.normal(*shape, **draw, grad=False)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "strided":
            x = torch.cat((x, x), 1)[:, : shape[1]]
        elif layout == "transposed":
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout != "contiguous":
            raise ValueError(f"laid_out: layout: got {layout!r}")
        return x.requires_grad_()

    def _finish(self, x: torch.Tensor, grad: bool) -> torch.Tensor:
        return x.to(self.dtype).to(self.device).requires_grad_(grad)


@dataclass(frozen=True)
class Case:
    """One set of arguments for the public op: `inputs(Tensors)` gives its keyword arguments."""

    name: str
    inputs: Callable[[Tensors], dict[str, Any]]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ErrorCase:
    """Arguments that must be refused at once, and what the message must say (a regular expression)."""

    name: str
    inputs: Callable[[Tensors], dict[str, Any]]
    error: type[Exception]
    message: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Cost:
    """What forward plus backward must do at least: floating-point operations, and bytes through memory."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class LibraryOp:
    """One operator of torch.ops.genai_fast: its schema (the last argument is always `str backend`) and its fake.

    `reference.py`, `cpu_kernel.py` and `triton_kernel.py` of the folder each define a function of the same name
    that takes the same arguments without `backend`.
    """

    schema: str
    fake: Callable[..., Any]
    # Backends with a kernel of it, where the folder has them; on the others the reference is what is meant to serve.
    kernels: tuple[str, ...] = ("cpu", "triton")
    # (backend, *arguments) -> why its kernel leaves such arguments to the reference, or "".
    refuses: Callable[..., str] | None = None

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]


@dataclass(frozen=True)
class CompileCase:
    """One Triton kernel as the launcher would compile it, for the gate that needs no GPU.

    `signature` maps every argument of the kernel to a Triton type ("*fp32", "i32", ...) or to a constexpr's value.
    """

    name: str
    kernel: str  # name of the function
    signature: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    elements: int | None = None  # elements that one program handles: instructions per element are then known
    max_instructions_per_element: float | None = None  # on sm_90
    tensor_cores: bool = False
    wide_loads: bool = False  # must load 16 bytes at a time
    module: str = ""  # that holds it, below genai_fast.kernels; the folder's triton_kernel by default
    architectures: tuple[int, ...] = ()  # that it is launched on (80, 90, ...); all by default


def choices_of(**settings: Sequence[int]) -> tuple[dict[str, int], ...]:
    """One dictionary for each position of the sequences."""
    return tuple(dict(zip(settings, values, strict=True)) for values in zip(*settings.values(), strict=True))


# Elements of a program and warps, of kernels that go through memory once.
ELEMENTWISE_CHOICES = choices_of(elements=(512, 512, 2048, 2048, 4096), num_warps=(2, 4, 4, 8, 8))


@dataclass(frozen=True)
class OpSpec:
    """A public op: `genai_fast.ops.<name>`."""

    name: str
    folder: str  # kernels/<folder>; a folder may hold more than one public op
    formula: str  # one line, for the op table
    source: str  # paper or standard that defines it
    library: tuple[LibraryOp, ...]
    reference: Callable[..., Any]  # plain PyTorch with the public signature: the definition
    cases: tuple[Case, ...]
    error_cases: tuple[ErrorCase, ...]
    bench_cases: tuple[Case, ...]  # named after the model that they come from
    peers: dict[str, Callable[..., Any]]  # what people write in eager PyTorch; the first is the one compared with
    cost: Callable[..., Cost]  # of the public arguments
    gpu_cases: tuple[Case, ...] = ()  # bench cases of a GPU's size, on CUDA only
    gpu_peers: dict[str, Callable[..., Any]] = field(default_factory=dict)  # more peers there; one may refuse a case
    compile_cases: tuple[CompileCase, ...] = ()
    # <folder>/<kernel>, as launchers ask kernels.common.tuned -> the settings that a tuner tries beside the default.
    choices: dict[str, tuple[dict[str, int], ...]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    backends: tuple[str, ...] = ("reference", "cpu", "triton")
    double_backward: bool = True
    mutates: tuple[str, ...] = ()  # arguments that the op and its reference update in place
    extra_tolerance: dict[str, tuple[float, str]] = field(default_factory=dict)  # output or input -> (floor, reason)
    compiled: bool = True  # whether the bench has torch.compile of the first peer: long loops take it minutes

    def __str__(self) -> str:
        return self.name
