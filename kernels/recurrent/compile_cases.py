"""The launches of recurrent layers, for the gate that compiles them without a GPU."""

from __future__ import annotations

from genai_fast.kernels.common.spec import CompileCase
from genai_fast.kernels.recurrent.tiles import sequence_tile

_STEP_POINTERS = {
    "_gru_step": ("gates_ptr", "products_ptr", "bias_ptr", "state_ptr", "y_ptr", "saved_ptr"),
    "_gru_step_backward": (
        "grad_y_ptr", "products_ptr", "saved_ptr", "before_ptr", "grad_ptr", "grad_gates_ptr", "grad_n_ptr",
        "factor_ptr",
    ),
    "_lstm_step": ("gates_ptr", "products_ptr", "cell_ptr", "y_ptr", "saved_ptr"),
    "_lstm_step_backward": (
        "grad_y_ptr", "products_ptr", "saved_ptr", "before_ptr", "before_stride", "grad_ptr", "grad_gates_ptr",
    ),
}  # fmt: skip
_SEQUENCE_POINTERS = {
    "_gru_sequence": ("gates_ptr", "h0_ptr", "weight_ptr", "bias_ptr", "state_ptr", "y_ptr", "saved_ptr"),
    "_gru_sequence_backward": (
        "grad_y_ptr", "saved_ptr", "y_ptr", "h0_ptr", "weight_ptr", "grad_ptr", "grad_gates_ptr", "grad_n_ptr",
    ),
    "_lstm_sequence": ("gates_ptr", "h0_ptr", "weight_ptr", "cell_ptr", "y_ptr", "saved_ptr"),
    "_lstm_sequence_backward": (
        "grad_y_ptr", "grad_h_ptr", "saved_ptr", "c0_ptr", "weight_ptr", "grad_ptr", "grad_gates_ptr",
    ),
}  # fmt: skip
_FLOAT32 = ("state_ptr", "saved_ptr", "cell_ptr", "grad_ptr")  # what is not rounded


def _types(dtype, pointers):
    return {p: "*fp32" if p in _FLOAT32 else dtype for p in pointers}


def _step(kernel, dtype):
    """For 256 hidden units."""
    signature = {**_types(dtype, _STEP_POINTERS[kernel]), "hidden": "i32", "BLOCK": 256}
    if kernel == "_lstm_step_backward":
        signature |= {"before_ptr": "*fp32", "before_stride": "i32"}
    return CompileCase(f"{kernel[1:]}-{dtype[1:]}", kernel, signature, elements=256, max_instructions_per_element=220)


def _sequence(kernel, dtype, hidden, precision="ieee"):
    backward, exact = kernel.endswith("_backward"), dtype == "*fp32" and precision == "ieee"
    tile = sequence_tile(hidden, 4 if dtype == "*fp32" else 2, backward)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    sizes = dict.fromkeys(("first", "last", *(("steps",) if backward else ()), "batch", "hidden"), "i32")
    signature = {
        **_types(dtype, _SEQUENCE_POINTERS[kernel]),
        "counters_ptr": "*i32",
        **sizes,
        **tile,
        "PRECISION": precision,
        "UPCAST": False,
    }
    return CompileCase(
        f"{kernel[1:]}-{hidden}-{dtype[1:]}{'-exact' if exact else ''}", kernel, signature, **options,
        tensor_cores=not exact, wide_loads=True, module="recurrent.sequence_triton",
    )  # fmt: skip


def compile_cases(op: str) -> tuple[CompileCase, ...]:
    """Of gru or lstm."""
    steps = [k for k in _STEP_POINTERS if k.startswith(f"_{op}_")]
    sequences = [k for k in _SEQUENCE_POINTERS if k.startswith(f"_{op}_")]
    return (
        *(_step(kernel, dtype) for kernel in steps for dtype in ("*fp32", "*bf16")),
        *(_sequence(kernel, "*bf16", hidden) for kernel in sequences for hidden in (256, 512)),
        *(_sequence(kernel, "*fp32", 256, "tf32") for kernel in sequences),
        _sequence(sequences[0], "*fp32", 256, "ieee"),
    )
