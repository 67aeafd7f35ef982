"""The library torch.ops.genai_fast: every LibraryOp of every schema, routed by genai_fast.backends."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from genai_fast.backends import select, survey
from genai_fast.kernels.common.schema import LibraryOp
from genai_fast.ops import attention_peers  # noqa: F401  (which tells backends of them)
from genai_fast.ops.checks import draw_seed
from genai_fast.registry import LIBRARIES

LIBRARY = torch.library.Library("genai_fast", "DEF")


def _register(op: LibraryOp) -> None:
    name = op.name
    expected = [x.name if x.type.kind() == "TensorType" else "" for x in torch._C.parse_schema(op.schema).arguments]

    def route(*arguments):
        for argument, x in zip(expected, arguments, strict=True):
            if x is None and argument:  # which PyTorch takes for a tensor, and a kernel for an optional one
                raise ValueError(f"{name}: {argument}: expected a tensor, got None")
        device, dtype, _ = survey(arguments)
        return select(name, arguments[-1], device, dtype)(*arguments[:-1])

    def fake(*arguments):
        return op.fake(*arguments[:-1])

    LIBRARY.define(op.schema)
    LIBRARY.impl(name, route, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genai_fast::{name}", fake, lib=LIBRARY)


for _op in LIBRARIES.values():
    _register(_op)


# Seeds come from an opaque op: inside a compiled region torch.randint would draw other numbers than in eager mode.
LIBRARY.define("draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


LIBRARY.impl("draw_seed", draw_seed, "CompositeExplicitAutograd")
torch.library.register_fake("genai_fast::draw_seed", lambda like: like.new_empty((), dtype=torch.int64), lib=LIBRARY)


def override(library: torch.library.Library, name: str, key: str, ours: Callable[..., Any]) -> None:
    """Put `ours` before aten's kernel `name`; what it answers with NotImplemented goes to the kernel that was there."""
    before = torch.library.get_kernel(f"aten::{name}", key)

    def serve(keys: Any, *arguments: Any, **more: Any) -> Any:
        result = ours(*arguments, **more)
        return before.call_boxed(keys, *arguments, **more) if result is NotImplemented else result

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # it is meant to be overridden
        library.impl(name, serve, key, with_keyset=True)
