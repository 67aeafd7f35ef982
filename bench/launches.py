"""The Triton launches of an op's cases, recorded on a machine without a GPU: nothing is compiled, nothing runs.

The public op runs on fake tensors, which have sizes and strides but no numbers, and call themselves CUDA tensors. Each
operator of torch.ops.genai_fast that it calls, backward included, calls its launcher and returns what its fake says. A
launch takes Triton's own path (binding of arguments, specialisation of multiples of 16 and of integers
that are 1, options) up to the hook that Triton calls before it compiles.
"""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from genai_fast import ops
from genai_fast.backends import use_backend
from genai_fast.kernels.common import launch, tuned
from genai_fast.kernels.common.spec import PRECISIONS, Case, OpSpec, Tensors
from genai_fast.precision import float32_products
from genai_fast.registry import FOLDERS, LIBRARIES

# By architecture: multiprocessors, and bytes of shared memory that a program may have.
DEVICES = {80: (108, 166912), 90: (132, 232448), 100: (148, 232448), 120: (188, 101376)}


@dataclass(frozen=True)
class Launch:
    """What Triton would compile."""

    module: str
    kernel: str  # the function's name
    signature: dict[str, str]  # argument -> type
    constants: dict[tuple[int, ...], Any]  # position -> value; integers of 1 and None too
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def identity(self) -> str:
        return repr((self.module, self.kernel, self.signature, self.constants, self.attributes, self.options))

    def source(self) -> Any:
        """Triton's source."""
        from triton.compiler import ASTSource

        function = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(function, self.signature, self.constants, self.attributes)

    def named_constants(self) -> dict[str, Any]:
        """Values that arguments are compiled for, by name."""
        names = list(self.signature)
        return {names[position]: value for (position, *_), value in self.constants.items()}

    def is_aligned(self, name: str) -> bool:
        """Whether an argument is known to be a multiple of 16."""
        position = (list(self.signature).index(name),)
        value = self.constants.get(position)
        return position in self.attributes or (value is not None and value % 16 == 0)


class _Driver:
    """What Triton asks a driver for before it compiles; each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """The launches inside on fake tensors, as on a GPU of that architecture."""
    from triton import knobs
    from triton.runtime.driver import driver

    recorded: list[Launch] = []

    def instead(*, fn: Any, compile: dict[str, Any], **more: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "launch_cooperative_grid")}
        if not compile["enable_fp_fusion"]:
            options["enable_fp_fusion"] = False
        attributes = {position: found for position, found in compile["configs"][0].items() if found}
        recorded.append(Launch(fn.module, fn.name, compile["signature"], compile["constants"], attributes, options))
        return True  # do not compile

    multiprocessors, shared_bytes = DEVICES[arch]
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=multiprocessors, shared_memory_per_block_optin=shared_bytes
    )
    with (
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(knobs.runtime, "jit_cache_hook", instead),
        # Storages of fake tensors begin at multiples of 16.
        mock.patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.element_size()),
        mock.patch.object(FakeTensor, "is_cuda", property(lambda x: True)),
        mock.patch.object(FakeTensor, "is_cpu", property(lambda x: False)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),  # so that no number is asked for
        mock.patch.object(launch, "properties", lambda device: properties),
        mock.patch.object(tuned, "_nearest", lambda *arguments: None),  # as launchers say, whatever was tuned
    ):
        yield recorded


class _Launching(TorchDispatchMode):
    """Calls the launcher of each library op, and returns what the op's fake says."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        library = LIBRARIES.get(function._opname) if function.namespace == "genai_fast" else None
        if library is None:
            return function(*arguments, **(more or {}))
        arguments = arguments[:-1]  # without the backend
        if "triton" in library.kernels and not (library.refuses and library.refuses("triton", *arguments)):
            module = importlib.import_module(f"genai_fast.kernels.{FOLDERS[library.name]}.triton_kernel")
            with torch.no_grad():
                getattr(module, library.name)(*arguments)
        return library.fake(*arguments)


def launches(op: OpSpec, case: Case, precision: str, arch: int) -> list[Launch]:
    """What a call of the op and its backward launch, in order, each time it is launched.

    Args:
        precision: one of PRECISIONS.
    """
    dtype, products = PRECISIONS[precision]
    with (
        float32_products(products, products), use_backend("triton"), recording(arch) as found, FakeTensorMode(),
        _Launching(),
    ):  # fmt: skip
        call(op, case.inputs(Tensors(dtype)))
    return found


def call(op: OpSpec, inputs: dict[str, Any]) -> None:
    """The op and its backward."""
    outputs = getattr(ops, op.name)(**inputs)
    outputs = [y for y in ([outputs] if isinstance(outputs, torch.Tensor) else outputs) if y.requires_grad]
    targets = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    if outputs and targets:
        torch.autograd.grad(outputs, targets, list(map(torch.empty_like, outputs)), allow_unused=True)
