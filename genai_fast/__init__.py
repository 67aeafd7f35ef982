"""Fused kernels for generative models: drop-in PyTorch ops on Triton (GPU) and C++ (CPU).

Everything but the version is imported when it is first used, so that `genai-fast --version` does not wait for torch.
`torch.ops.genai_fast` exists as soon as `genai_fast.ops` is imported: at once if torch is imported already.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from genai_fast import _moved
from genai_fast.versions import __version__

if TYPE_CHECKING:
    from genai_fast import data, evaluation, layers, models, ops, optim, profiling, training
    from genai_fast.acceleration import accelerate
    from genai_fast.backends import FallbackWarning, use_backend
    from genai_fast.cpu import tune_cpu
    from genai_fast.hugging_face import register_attention
    from genai_fast.lazy import lazy_logits
    from genai_fast.sdpa import enable_sdpa
    from genai_fast.swap import explain, fuse, unfuse

_HOMES = {
    "accelerate": "acceleration", "FallbackWarning": "backends", "use_backend": "backends", "tune_cpu": "cpu",
    "enable_sdpa": "sdpa", "lazy_logits": "lazy", "register_attention": "hugging_face",
    "explain": "swap", "fuse": "swap", "unfuse": "swap",
}  # fmt: skip

__all__ = [
    "FallbackWarning", "__version__", "accelerate", "data", "enable_sdpa", "evaluation", "explain", "fuse", "layers",
    "lazy_logits", "models", "ops", "optim", "profiling", "register_attention", "training", "tune_cpu", "unfuse",
    "use_backend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    full = f"{__name__}.{name}"
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif not name.startswith("_") and (full in sys.modules or importlib.util.find_spec(full)):
        value = importlib.import_module(full)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_moved.install()
if "torch" in sys.modules:
    importlib.import_module(f"{__name__}.ops")
