"""What an op folder says about itself, once. Tests, benchmarks, the compile gate and the op table read it from here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from genai_fast.kernels.common.schema import LibraryOp

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


# How a case is launched: its dtype, and how CUDA multiplies float32.
PRECISIONS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}


@dataclass(frozen=True)
class CompileCase(Case):
    """Arguments whose launches the compile gate records besides those of the bench cases; no number is computed."""

    precisions: tuple[str, ...] = ("bf16",)  # names in PRECISIONS


@dataclass(frozen=True)
class Expected:
    """What the compile gate expects of a kernel, besides that it compiles and spills no registers.

    `elements`, `most` and `may_spill` are functions of a launch's constants by name.
    """

    wide_loads: tuple[str, ...] | None = None  # loads of 16 bytes, if these arguments are multiples of 16
    elements: Callable[[dict[str, Any]], int] | None = None  # that one program handles
    most: Callable[[dict[str, Any]], float | None] | float | None = None  # instructions per element, on sm_90
    tensor_cores: bool = False  # matrix instructions, unless float32 is multiplied in full
    may_spill: Callable[[dict[str, Any]], bool] | None = None


@dataclass(frozen=True)
class Limits:
    """What forward and backward of a small case in bfloat16 may take on an emulated sm_90, launch by launch."""

    inputs: Callable[[Tensors], dict[str, Any]]
    instructions: tuple[float, ...]  # of threads, an element of the largest tensor: of each launch, in order
    sectors: float = 1.0  # of each launch: sectors moved over those that its bytes would fill
    conflicts: float = 1.0  # of each launch: wavefronts of shared memory over those without bank conflicts


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
    expected: dict[str, Expected] = field(default_factory=dict)  # Triton kernel -> what the compile gate expects of it
    limits: Limits | None = None  # each op with Triton kernels has some
    # <folder>/<kernel>, as launchers ask kernels.common.tuned -> the settings that a tuner tries beside the default.
    choices: dict[str, tuple[dict[str, int], ...]] = field(default_factory=dict)
    backends: tuple[str, ...] = ("reference", "cpu", "triton")
    double_backward: bool = True
    mutates: tuple[str, ...] = ()  # arguments that the op and its reference update in place
    extra_tolerance: dict[str, tuple[float, str]] = field(default_factory=dict)  # output or input -> (floor, reason)
    compiled: bool = True  # whether the bench has torch.compile of the first peer: long loops take it minutes

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """That its kernels take."""
        return self.library[0].dtypes

    def __str__(self) -> str:
        return self.name
