"""The launches of a Transformer's attention, for the gate that compiles them without a GPU."""

from __future__ import annotations

from dataclasses import replace

from genai_fast.kernels.causal_attention.tiles import forward_tile, keys_tile, padded, queries_tile, summary_rows
from genai_fast.kernels.common.spec import CompileCase

_BACKWARD = "causal_attention.backward_triton"
_LONG = 1024  # queries
_CAPABILITIES = (80, 90, 100, 120)
_STRIDES = {f"{x}_{of}": "i32" for x in "qkv" for of in ("batch", "head", "row")}
_GRAD_STRIDES = {f"grad_{of}": "i32" for of in ("batch", "head", "row")}
_OUT_STRIDES = {f"out_{of}": "i32" for of in ("batch", "head", "row")}
_SHARED = dict(
    starts_q_ptr=None, starts_k_ptr=None, seed_ptr=None, **_STRIDES, heads="i32", group=1, queries="i32", keys="i32",
    tiles="i32", scale="fp32", cap="fp32", window="i32", offset="i32", bound="i32", grown="fp32", INSIDE=True,
    CAUSAL=True, WINDOWED=False, CAPPED=False, ALIGNED=True, UPCAST=False,
)  # fmt: skip
_ROWS = dict(power_ptr="*fp32", delta_ptr="*fp32")

_GROUPED = dict(group="i32")
_PACKED = dict(starts_q_ptr="*i32", starts_k_ptr="*i32", ALIGNED=False)
_DROPPED = dict(seed_ptr="*i64")
_VARIANTS = {
    "full": dict(CAUSAL=False),
    "window": dict(WINDOWED=True),
    "softcap": dict(CAPPED=True),
    "dropout": _DROPPED,
    "packed_grouped": {**_PACKED, **_GROUPED},
    "packed_dropout": {**_PACKED, **_DROPPED},
}


def _size(dtype):
    return 4 if dtype == "*fp32" else 2


def _case(name, kernel, dtype, pointers, channels, tile, precision, **more):
    """Of pointers to `dtype`."""
    options = {k: v for k, v in tile.items() if k.startswith("num_")}
    blocks = {k: v for k, v in tile.items() if k.startswith("BLOCK_")}
    signature = {
        **_SHARED, **dict.fromkeys(pointers, dtype), "D": channels, "BLOCK_D": padded(channels), "PRECISION": precision,
        **blocks, **more,
    }  # fmt: skip
    exact = dtype == "*fp32" and precision == "ieee"
    return CompileCase(
        f"{name}-{channels}-{dtype[1:]}{'-exact' if exact else ''}",
        kernel,
        signature,
        **options,
        tensor_cores=not exact,
        wide_loads=channels * _size(dtype) % 16 == 0,
    )


def _extra(seed_ptr=None, starts_q_ptr=None, CAPPED=False, **more):
    """As the launcher's."""
    return (1 if starts_q_ptr is None else 2) if seed_ptr else int(CAPPED)


def _forward(name, dtype, channels, precision="tf32", queries=_LONG, capability=90, **more):
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    tile = forward_tile(_size(dtype), channels, queries, _extra(**more), capability)
    return _case(name, "_causal_attention_forward", dtype, pointers, channels, tile, precision, lse_ptr="*fp32", **more)


def _grad_queries(name, dtype, channels, precision="tf32", capability=90, **more):
    pointers = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr", "grad_q_ptr")
    tile = queries_tile(_size(dtype), channels, _extra(**more), capability)
    more = dict(**_ROWS, **_GRAD_STRIDES, out_scale="fp32", **more)
    case = _case(name, "_causal_attention_grad_queries", dtype, pointers, channels, tile, precision, **more)
    return replace(case, module=_BACKWARD)


def _grad_keys(name, dtype, channels, precision="tf32", capability=90, **more):
    pointers = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr", "grad_k_ptr", "grad_v_ptr")
    tile = keys_tile(_size(dtype), channels, _extra(**more), capability)
    more = dict(**_ROWS, **_GRAD_STRIDES, out_scale="fp32", **more)
    case = _case(name, "_causal_attention_grad_keys", dtype, pointers, channels, tile, precision, **more)
    return replace(case, module=_BACKWARD)


def _summary(dtype, channels):
    signature = dict(
        grad_ptr=dtype, out_ptr=dtype, lse_ptr="*fp32", grad_lse_ptr="*fp32", **_ROWS, **_GRAD_STRIDES, **_OUT_STRIDES,
        heads="i32", queries="i32", tiles="i32", D=channels, BLOCK_D=padded(channels), BLOCK_M=summary_rows(channels),
    )  # fmt: skip
    return CompileCase(
        f"summary-{channels}-{dtype[1:]}", "_causal_attention_summary", signature, module=_BACKWARD, wide_loads=True
    )


def _ones(case):
    """Memory at any address, and strides and numbers of heads of 1, of which Triton makes constants."""
    some = {k: 1 for k in case.signature if k in (*_STRIDES, *_GRAD_STRIDES, "heads") and not k.endswith("row")}
    rows = {k: "i32:1" for k in ("q_row", "k_row", "v_row", "grad_row") if k in case.signature}
    pointers = {
        k: f"{v}:{int(v[-2:]) // 8}" for k, v in case.signature.items() if isinstance(v, str) and v.startswith("*")
    }
    signature = {**case.signature, **some, **rows, **pointers}
    return replace(case, name=f"{case.name}-ones", signature=signature, wide_loads=False)


def _each(make):
    """As many cases as there are tiles: each for the architectures that have it."""

    def cases(*arguments, **more):
        found = {}
        for capability in _CAPABILITIES:
            case = make(*arguments, capability=capability, **more)
            tile = case.signature["BLOCK_M"], case.signature["BLOCK_N"], case.num_warps, case.num_stages
            found.setdefault(tile, (case, []))[1].append(capability)
        return [replace(case, architectures=tuple(some)) for case, some in found.values()]

    return cases


_KERNELS = (("forward", _each(_forward)), ("grad_queries", _each(_grad_queries)), ("grad_keys", _each(_grad_keys)))


def _cases():
    for name, make in _KERNELS:
        for channels in (64, 128, 256):
            yield from make(name, "*bf16", channels)
        yield from make(name, "*fp16", 64)
        for precision in ("tf32", "ieee"):
            yield from make(name, "*fp32", 64, precision)
        yield from make(name, "*fp32", 128, "ieee")
        if name != "grad_keys":  # which spills 264 bytes there
            yield from make(name, "*fp32", 256, "ieee")
        for variant, more in _VARIANTS.items():
            yield from make(f"{name}_{variant}", "*bf16", 64, **more)
        yield from make(f"{name}_dropout", "*bf16", 128, **_DROPPED)
        yield from map(_ones, make(name, "*bf16", 20))
        yield from map(_ones, make(f"{name}_packed_dropout", "*bf16", 20, **_VARIANTS["packed_dropout"]))
    yield from _each(_forward)("forward_short", "*bf16", 64, queries=64)
    yield _summary("*bf16", 64)


COMPILE_CASES = tuple(_cases())
