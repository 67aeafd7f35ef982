"""gated_act: what the op is, its cases and its cost."""

import torch

from genai_fast.kernels.common.activations import activate
from genai_fast.kernels.common.spec import (
    ELEMENTWISE_CHOICES,
    Case,
    CompileCase,
    Cost,
    ErrorCase,
    Expected,
    Limits,
    OpSpec,
)
from genai_fast.kernels.gated_act.layout import ACTIVATIONS
from genai_fast.kernels.gated_act.reference import halves, shifted
from genai_fast.kernels.gated_act.schema import LIBRARY


def _reference(x, up=None, bias=None, activation="silu", gate_multiplier=1.0, down_multiplier=1.0):
    """Each step rounded as PyTorch's own are."""
    gate, linear = halves(x, up)
    if bias is not None:
        gate, linear = (z.to(x.dtype) for z in shifted(x, up, bias))
    gate = gate * gate_multiplier if gate_multiplier != 1.0 else gate
    y = activate(gate, activation, 0.0) * linear
    return y * down_multiplier if down_multiplier != 1.0 else y


def _eager(x, up=None, bias=None, activation="silu"):
    """What people write: a layer's bias, its halves, the activation, the product."""
    if bias is not None:
        x = x + bias
    gate, linear = halves(x, up)
    return activate(gate, activation, 0.0) * linear


def _cost(x, up=None, bias=None, activation="silu"):
    # Forward reads gate and up and writes y; backward reads these and dy and writes two gradients.
    elements = x.numel() // (2 if up is None else 1)
    return Cost(flops=40 * elements, bytes=8 * elements * x.element_size())


def _inputs(*shape, layout="contiguous", packed=False, bias=False, **more):
    """gate and up of that shape, or x with both."""

    def make(t):
        columns = shape[-1]
        whole = (*shape[:-1], 2 * columns) if packed else shape
        tensors = dict(x=t.laid_out(layout, *whole, scale=2.0))
        if not packed:
            tensors.update(up=t.laid_out(layout, *shape))
        if bias:
            tensors.update(bias=t.normal(2 * columns, scale=0.5))
        return dict(**tensors, **more)

    return make


def _mixed(t):
    """Activations of a narrow dtype beside a float32 bias, as under autocast."""
    wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
    return dict(x=t.normal(6, 5, 24), bias=wide_t.normal(24))


def _rows_with_gaps(t):
    """Halves of one tensor, and not its whole rows: as of a projection that makes other things too."""
    packed = t.normal(5, 9, 3, 40, grad=False)
    return dict(x=packed[:, :, 0].requires_grad_(), up=packed[:, :, 2].requires_grad_())


_SPECIAL = [0.0, -0.0, 80.0, -80.0, float("inf"), -float("inf"), float("nan"), 1e-30, 1e4, -1e4, -5.0]


def _special(activation, packed=True):
    """Every pair."""

    def make(t):
        # PyTorch's own gelu of +inf is NaN or inf, by where it stands in the tensor.
        gates = [v for v in _SPECIAL if activation != "gelu" or v != float("inf")]
        gate, up = [[v] * len(_SPECIAL) for v in gates], [_SPECIAL] * len(gates)
        if packed:
            return dict(x=t.values([a + b for a, b in zip(gate, up, strict=True)]), activation=activation)
        return dict(x=t.values(gate), up=t.values(up), activation=activation)

    return make


CASES = (
    Case("pair", _inputs(6, 7, 40)),
    Case("packed", _inputs(6, 7, 40, packed=True)),
    Case("second_order", _inputs(3, 4, bias=True, packed=True, activation="gelu")),
    Case("multipliers", _inputs(7, 5, 13, packed=True, bias=True, gate_multiplier=0.75, down_multiplier=-2.5)),
    Case("target_gradient", _inputs(3, 4, activation="gelu", gate_multiplier=1.5, down_multiplier=0.5)),
    Case("down_multiplier", _inputs(6, 7, 40, activation="gelu_tanh", down_multiplier=0.25)),
    Case("biased", _inputs(33, 130, packed=True, bias=True)),
    Case("biased_pair", _inputs(33, 130, bias=True, activation="gelu_tanh")),
    Case("odd", _inputs(7, 5, 13, packed=True, bias=True, activation="gelu")),
    Case("one_element", _inputs(1, 1, packed=True, bias=True)),
    Case("vector", _inputs(9, packed=True, bias=True)),
    Case("four_dimensions", _inputs(2, 3, 2, 8)),
    Case("many_rows", _inputs(2100, 24, packed=True, bias=True)),
    Case("wide_rows", _inputs(3, 4500, packed=True, bias=True)),
    Case("wide_rows_pair", _inputs(2, 9000, activation="gelu_tanh")),
    Case("parallel", _inputs(40, 1050, packed=True, bias=True, activation="gelu")),
    Case("strided", _inputs(8, 6, 30, layout="strided")),
    Case("transposed", _inputs(8, 30, layout="transposed")),
    Case("rows_with_gaps", _rows_with_gaps),
    Case("mixed_dtypes", _mixed),
    Case("empty_batch", _inputs(0, 8, packed=True, bias=True)),
    Case("empty_batch_of_sequences", _inputs(3, 0, 8)),
    Case("empty_columns", _inputs(4, 0, packed=True, bias=True)),
    *(Case(f"special_values_{name}", _special(name)) for name in ("silu", "gelu", "gelu_tanh", "sigmoid", "none")),
    Case("special_values_pair", _special("silu", False)),
    *(Case(f"all_{name}", _inputs(5, 4, 24, packed=True, activation=name)) for name in ACTIVATIONS),
)

_GOOD = _inputs(4, 6, packed=True)
_PAIR = _inputs(4, 6)
ERROR_CASES = (
    ErrorCase("odd_columns", lambda t: dict(x=t.normal(4, 7)), ValueError, r"x: expected \[\.\.\., 2 D\].*\(4, 7\)"),
    ErrorCase("scalar", lambda t: dict(x=t.normal()), ValueError, r"x: expected \[\.\.\., 2 D\].*got shape \(\)"),
    ErrorCase("up_shape", lambda t: {**_PAIR(t), "up": t.normal(4, 5)}, ValueError,
              r"up: expected shape \(4, 6\) as x has, got \(4, 5\)"),
    ErrorCase("up_dtype", lambda t: {**_PAIR(t), "up": t.normal(4, 6).double()}, TypeError,
              r"up: expected torch\.float32 as x has, got torch\.float64"),
    ErrorCase("up_device", lambda t: {**_PAIR(t), "up": t.normal(4, 6).to("meta")}, ValueError,
              r"up: expected device cpu as x has, got meta"),
    ErrorCase("bias_shape", lambda t: {**_GOOD(t), "bias": t.normal(6)}, ValueError,
              r"bias: expected shape \(12,\), the gate's half first, got \(6,\)"),
    ErrorCase("bias_dtype", lambda t: {**_GOOD(t), "bias": t.normal(12).double()}, TypeError,
              r"bias: expected torch\.float32.*got torch\.float64"),
    ErrorCase("bias_device", lambda t: {**_GOOD(t), "bias": t.normal(12).to("meta")}, ValueError,
              r"bias: expected device cpu as x has, got meta"),
    ErrorCase("integers", lambda t: dict(x=torch.ones(4, 6, dtype=torch.int32)), TypeError,
              r"x.*floating.*got torch\.int32"),
    ErrorCase("gate_multiplier", lambda t: {**_GOOD(t), "gate_multiplier": float("inf")}, ValueError,
              r"gate_multiplier: expected a finite float, got inf"),
    ErrorCase("down_multiplier", lambda t: {**_GOOD(t), "down_multiplier": None}, ValueError,
              r"down_multiplier: expected a finite float, got None"),
    ErrorCase("activation", lambda t: {**_GOOD(t), "activation": "swish"}, ValueError,
              r"activation: expected one of 'silu', .*got 'swish'"),
)  # fmt: skip

BENCH_CASES = (
    Case("llama_like-4096x1024-packed", _inputs(4096, 1024, packed=True)),
    Case("llama_like-4096x1024-pair", _inputs(4096, 1024)),
    Case("geglu-4096x1024-packed", _inputs(4096, 1024, packed=True, activation="gelu")),
    Case("swiglu_bias-4096x1024-packed", _inputs(4096, 1024, packed=True, bias=True)),
)

_COMPILE_CASES = (
    CompileCase("geglu_bias", _inputs(4096, 1024, packed=True, bias=True, activation="gelu")),
    CompileCase("geglu_tanh", _inputs(4096, 1024, packed=True, activation="gelu_tanh")),
    CompileCase("multipliers", _inputs(4096, 1024, gate_multiplier=0.5, down_multiplier=2.0)),
)
_MOST = {"gelu": 60, "gelu_tanh": 50}  # instructions per element, in float32
_EXPECTED = dict.fromkeys(
    ("_gated_act_forward", "_gated_act_backward"),
    Expected((), lambda c: c["ROWS"] * c["BLOCK"] * c.get("STEPS", 1), lambda c: _MOST.get(c["ACTIVATION"], 50)),
)

GATED_ACT = OpSpec(
    name="gated_act",
    folder="gated_act",
    formula="activation(gate + bias) (up + bias), and multipliers: SwiGLU, GEGLU, GLU, ReGLU; also as swiglu, geglu",
    source="Shazeer 2020, arXiv:2002.05202",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_inputs(64, 1024, packed=True), (7.6, 12.2), 1.05, 1.05),
    peers={"eager": _eager},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    choices={"gated_act/forward": ELEMENTWISE_CHOICES, "gated_act/backward": ELEMENTWISE_CHOICES},
)
