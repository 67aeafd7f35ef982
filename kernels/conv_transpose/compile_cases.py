"""The launches of a DCGAN's layers, for the gate that compiles them without a GPU."""

from __future__ import annotations

from dataclasses import replace

from genai_fast.kernels.common.spec import CompileCase

_GEOMETRY = dict(KH=4, KW=4, SH=2, SW=2, PH=1, PW=1)
_SIZES = dict(batch="i32", height="i32", width="i32", out_height="i32", out_width="i32", channels="i32")
_FEW = dict(CO=3)  # an image's channels
_FEW_MODULE = "conv_transpose.few_triton"


def _tile(dtype, rows=128, columns=64, exact=False):
    """The launcher's tile: 128 bytes of channels a step, 64 where float32 is multiplied without matrix instructions."""
    reduced = 16 if exact else 64 if dtype != "*fp32" else 32
    precision = "tf32" if dtype == "*fp32" and not exact else "ieee"
    return dict(PRECISION=precision, UPCAST=False, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=reduced)


def _case(name, kernel, dtype, pointers, constants, **options):
    """Of pointers to `dtype`, and constants and types of all other arguments."""
    narrow = {p: dtype for p in pointers}
    exact = constants["PRECISION"] == "ieee" and dtype == "*fp32"
    signature = {**_GEOMETRY, **narrow, **constants}
    return CompileCase(f"{name}-{dtype[1:]}", kernel, signature, tensor_cores=not exact, **options)


def _forward(name, dtype, tile, statistics=False, even=True, **more):
    constants = dict(
        bias_ptr="*fp32", partial_ptr="*fp32" if statistics else None, plane="i32", slope="fp32", TOGETHER=False,
        EVEN=even, ACTIVATION="none" if statistics else "leaky_relu", out_channels="i32", **_SIZES, **tile,
    )  # fmt: skip
    stages = 1 if more.get("TOGETHER") else 3
    pointers = ("x_ptr", "weight_ptr", "y_ptr")
    return _case(
        name, "_conv_transpose_forward", dtype, pointers, {**constants, **more}, num_stages=stages, wide_loads=even
    )


def _grad_input(name, dtype, tile, even=True):
    pointers = ("grad_y_ptr", "weight_ptr", "grad_x_ptr")
    constants = dict(out_channels="i32", EVEN=even, **_SIZES, **tile)
    return _case(name, "_conv_transpose_grad_input", dtype, pointers, constants, wide_loads=even)


def _grad_weight(name, dtype, tile):
    constants = dict(partial_ptr="*fp32", out_channels="i32", steps="i32", **_SIZES, **tile)
    return _case(name, "_conv_transpose_grad_weight", dtype, ("grad_y_ptr", "x_ptr"), constants)


def _few_grad_input(name, dtype, tile):
    pointers = ("grad_y_ptr", "weight_ptr", "grad_x_ptr")
    return _case(name, "_few_grad_input", dtype, pointers, {**_FEW, **_SIZES, **tile}, module=_FEW_MODULE)


def _few_grad_weight(name, dtype, tile):
    constants = dict(partial_ptr="*fp32", steps="i32", **_FEW, **_SIZES, **tile)
    return _case(name, "_few_grad_weight", dtype, ("grad_y_ptr", "x_ptr"), constants, module=_FEW_MODULE)


_SPECIAL = dict(TOGETHER=True, ACTIVATION="tanh", out_channels="i32:1")

_EXACT = _tile("*fp32", 64, 32, exact=True)
_LEAST = {**_tile("*fp16", 64, 16), "BLOCK_K": 16}
_FIRST = dict(height=1, width=1, SH=4, SW=4, PH=0, PW=0)


def _ones(case):
    """The launch of one pixel and one channel, with memory at any address: Triton makes constants of integers of 1."""
    integers = {k: 1 for k, v in case.signature.items() if v in ("i32", "i32:1")}
    pointers = {k: f"{v}:2" for k, v in case.signature.items() if isinstance(v, str) and v.startswith("*fp16")}
    signature = {**case.signature, **integers, **pointers, "SH": 1, "SW": 1}
    return replace(case, name=f"{case.name}-ones", signature=signature, wide_loads=False)


COMPILE_CASES = (
    *(
        case
        for dtype in ("*fp16", "*bf16", "*fp32")
        for case in (
            _forward("forward", dtype, _tile(dtype)),
            _forward("forward_small", dtype, _tile(dtype, 64)),
            _forward("statistics", dtype, _tile(dtype), statistics=True),
            _forward("few_forward", dtype, _tile(dtype, 128, 16), **_SPECIAL),
            _grad_input("grad_input", dtype, _tile(dtype)),
            _grad_weight("grad_weight", dtype, _tile(dtype, 64 if dtype == "*fp32" else 128)),
            _few_grad_input("few_grad_input", dtype, _tile(dtype)),
            _few_grad_weight("few_grad_weight", dtype, _tile(dtype, 64)),
        )
    ),
    _grad_weight("grad_weight_small", "*fp16", _tile("*fp16", 64)),
    _forward("forward_100_channels", "*fp16", _tile("*fp16", 64), even=False, channels="i32:4"),
    # An integer of 1 becomes a constant: the first layer, from one pixel.
    _forward("forward_first", "*fp16", _tile("*fp16", 64), even=False, channels="i32:4", **_FIRST),
    _forward("forward_exact", "*fp32", _EXACT),
    _grad_input("grad_input_exact", "*fp32", _EXACT),
    _grad_weight("grad_weight_exact", "*fp32", _EXACT),
    *map(
        _ones,
        (
            _forward("forward", "*fp16", _LEAST, even=False),
            _forward("statistics", "*fp16", _LEAST, even=False, statistics=True),
            _forward("few_forward", "*fp16", _LEAST, even=False, **_SPECIAL),
            _grad_input("grad_input", "*fp16", _LEAST, even=False),
            _grad_weight("grad_weight", "*fp16", _LEAST),
            _few_grad_input("few_grad_input", "*fp16", _LEAST),
            _few_grad_weight("few_grad_weight", "*fp16", _LEAST),
        ),
    ),
    CompileCase(
        "sum_splits",
        "_sum_splits",
        dict(partial_ptr="*fp32", grad_ptr="*bf16", count="i32", splits="i32", BLOCK=1024),
        wide_loads=True,
    ),
)
