"""What runs kernels here: the C++ extension and its instruction set, and whether Triton interprets."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch  # first: the extension then shares torch's OpenMP runtime

from genai_fast.errors import UsageError
from genai_fast.kernels.common.recorder import watching


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """The C++ extension, or None and the reason why it is missing."""
    try:
        return importlib.import_module("genai_fast._cpu"), ""
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}); remedy: build it with a C++ compiler (pip install .)"


@functools.cache
def cpu_kernels() -> tuple[dict[str, Callable[..., None]], str]:
    """The C++ kernels of the best instruction set here (or of GENAI_FAST_ISA), and that set's name."""
    module, reason = extension()
    if module is None:
        raise RuntimeError(reason)
    available = [isa for isa, supported in module.instruction_sets().items() if supported]
    wanted = os.environ.get("GENAI_FAST_ISA", available[-1])
    if wanted not in available:
        raise UsageError(f"GENAI_FAST_ISA: expected one of {', '.join(available)} on this processor, got {wanted!r}")
    return module.kernels(wanted), wanted


class _Kernels:
    """The C++ kernels as attributes; each call gets the number of threads as its last argument."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel, threads = cpu_kernels()[0][name], torch.get_num_threads

        def call(*arguments: Any) -> None:
            kernel(*arguments, threads())
            recorder = watching()
            if recorder is not None:
                recorder.called(kernel, arguments, threads)

        setattr(self, name, call)  # found at once from now on
        return call


cpp = _Kernels()
