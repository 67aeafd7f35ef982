"""gru and lstm: what the ops are, their cases and their cost."""

import torch

from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec
from genai_fast.kernels.recurrent.schema import GRU_LIBRARY, LSTM_LIBRARY


def _parameters(weight_ih, weight_hh, bias_ih, bias_hh):
    """As torch.gru and torch.lstm take them: (weights, and either both biases or none), whether with biases."""
    if bias_ih is None and bias_hh is None:
        return (weight_ih, weight_hh), False
    biases = (weight_hh.new_zeros(weight_hh.size(0)) if b is None else b for b in (bias_ih, bias_hh))
    return (weight_ih, weight_hh, *biases), True


def _state(h0, x, weight_hh):
    return (x.new_zeros(x.size(1), weight_hh.size(1)) if h0 is None else h0).unsqueeze(0)


def _eager_gru(x, h0, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """nn.GRU of one layer, by the function that it calls."""
    parameters, biases = _parameters(weight_ih, weight_hh, bias_ih, bias_hh)
    y, h_n = torch.gru(x, _state(h0, x, weight_hh), parameters, biases, 1, 0.0, True, False, False)
    return y, h_n.squeeze(0)


def _eager_lstm(x, h0, c0, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """nn.LSTM of one layer, by the function that it calls."""
    parameters, biases = _parameters(weight_ih, weight_hh, bias_ih, bias_hh)
    states = tuple(_state(s, x, weight_hh) for s in (h0, c0))
    y, h_n, c_n = torch.lstm(x, states, parameters, biases, 1, 0.0, True, False, False)
    return y, h_n.squeeze(0), c_n.squeeze(0)


def _sequence_cost(saved_of_unit):
    def cost(x, weight_ih, weight_hh, **more):
        # Six matrix products: both forward, and backward both to their left and to their right. Gates and what is
        # kept for backward are written once and read once, and so are x, y and their gradients.
        steps, hidden = x.size(0) * x.size(1), weight_hh.size(1)
        weights = weight_ih.numel() + weight_hh.numel()
        rows = 2 * x.size(2) + 2 * hidden + 2 * 2 * weight_hh.size(0) + 2 * saved_of_unit * hidden
        return Cost(flops=3 * 2 * steps * weights, bytes=(steps * rows + 3 * weights) * x.element_size())

    return cost


def _inputs(
    steps, batch, inputs, hidden, gates, *, states=("h0",), given=True, bias=("bias_ih", "bias_hh"), scale=1.0,
    grad=True,
):  # fmt: skip
    """x, the states (or None), weights as PyTorch initialises them in size, and the named biases."""

    def make(t):
        width = gates * hidden
        x = t.normal(steps, batch, inputs, grad=grad)
        found = {"x": x, **{s: t.normal(batch, hidden, scale=0.5, grad=grad) if given else None for s in states}}
        found["weight_ih"] = t.normal(width, inputs, scale=scale * max(inputs, 1) ** -0.5, grad=grad)
        found["weight_hh"] = t.normal(width, hidden, scale=scale * hidden**-0.5, grad=grad)
        return {**found, **{b: t.normal(width, scale=0.3, grad=grad) for b in bias}}

    return make


def _transposed(make):
    """x as batch_first gives it, and weights that are parts of others."""

    def changed(t):
        found = make(t)
        for name, dims in (("x", (0, 1)), ("weight_ih", (0, 1)), ("weight_hh", (0, 1))):
            dense = found[name].detach().transpose(*dims).contiguous()
            found[name] = dense.transpose(*dims).requires_grad_()
        return found

    return changed


def _special(make):
    """A sample with a NaN in the middle of its sequence, two with values that saturate all gates, and ordinary ones."""

    def changed(t):
        found = make(t)
        x = found["x"].detach().clone()
        x[1, 0, 0], x[2, 1, 0], x[0, 2, 1] = float("nan"), 1e4, -1e4
        found["x"] = x.requires_grad_()
        return found

    return changed


def _cases(gates, **more):
    def make(*sizes, **settings):
        return _inputs(*sizes, gates, **more, **settings)

    return (
        Case("odd", make(4, 3, 4, 5)),
        Case("second_order", make(3, 2, 2, 3)),
        Case("long_row", make(3, 19, 7, 137)),
        Case("one_step", make(1, 4, 3, 6)),
        Case("one_sample", make(7, 1, 6, 37)),
        Case("one_element", make(1, 1, 1, 1, given=False)),
        Case("one_unit", make(5, 3, 2, 1)),
        Case("wide", make(3, 5, 9, 256)),
        Case("many_rows", make(2, 70, 5, 33)),
        Case("many_steps", make(40, 2, 3, 8)),
        Case("no_state", make(5, 3, 4, 8, given=False)),
        Case("no_bias", make(5, 3, 4, 8, bias=())),
        Case("bias_ih", make(5, 3, 4, 8, bias=("bias_ih",))),
        Case("bias_hh", make(5, 3, 4, 8, bias=("bias_hh",), given=False)),
        Case("saturated", make(6, 4, 5, 16, scale=5.0)),
        Case("strided", _transposed(make(5, 3, 4, 20))),
        Case("empty_batch", make(3, 0, 4, 5)),
        Case("no_gradient", make(4, 3, 4, 19, grad=False)),
        Case("special_values", _special(make(4, 5, 3, 18))),
    )


def _error_cases(gates, good):
    """Arguments that do not fit, of either op."""
    rows = 5 * gates
    return (
        _wrong("dimensions", good, r"x.*\[T, B, I\].*got shape \(3, 4\)", x=lambda t: t.normal(3, 4)),
        _wrong("no_steps", good, r"x.*at least 1 step.*got shape \(0, 3, 4\)", x=lambda t: t.normal(0, 3, 4)),
        _wrong("input_size", good, rf"weight_ih.*expected shape \({rows}, 4\).*got \({rows}, 6\)",
               weight_ih=lambda t: t.normal(rows, 6)),
        _wrong("gates", good, rf"weight_hh.*\[{gates} H, H\].*got shape \(5, 5\)", weight_hh=lambda t: t.normal(5, 5)),
        _wrong("weight_dimensions", good, r"weight_hh.*got shape \(5,\)", weight_hh=lambda t: t.normal(5)),
        _wrong("state", good, r"h0.*expected shape \(3, 5\).*got \(1, 3, 5\)", h0=lambda t: t.normal(1, 3, 5)),
        _wrong("bias", good, rf"bias_hh.*expected shape \({rows},\).*got \(5,\)", bias_hh=lambda t: t.normal(5)),
        _wrong("dtype", good, r"weight_ih.*expected torch\.float32.*got torch\.float64", TypeError,
               weight_ih=lambda t: t.normal(rows, 4).double()),
        _wrong("state_dtype", good, r"h0.*expected torch\.float32.*got torch\.bfloat16", TypeError,
               h0=lambda t: t.normal(3, 5).bfloat16()),
        _wrong("device", good, r"bias_ih.*expected device cpu.*got meta", bias_ih=lambda t: t.normal(rows).to("meta")),
        _wrong("integers", good, r"x.*floating.*got torch\.int32", TypeError,
               x=lambda t: torch.ones(3, 3, 4, dtype=torch.int32)),
        _wrong("no_weight", good, r"weight_hh.*expected a tensor, got NoneType", TypeError, weight_hh=None),
    )  # fmt: skip


def _wrong(name, good, message, error=ValueError, **change):
    """An error case: the good arguments with these changes, which may be functions of Tensors."""

    def make(t):
        return {**good(t), **{k: v(t) if callable(v) else v for k, v in change.items()}}

    return ErrorCase(name, make, error, message)


_CELL = dict(states=("h0", "c0"))


def _compile_cases(gates, **more):
    """512 units in one launch, and 1024, which are launched step by step."""
    return (
        CompileCase("units_256", _inputs(4, 32, 256, 256, gates, given=False, **more), ("fp32", "tf32")),
        CompileCase("units_512", _inputs(4, 32, 256, 512, gates, given=False, **more)),
        CompileCase("units_1024", _inputs(4, 32, 256, 1024, gates, given=False, **more), ("fp32", "bf16")),
    )


_STEP = Expected(None, lambda c: c["BLOCK"], 220)
_SEQUENCE = Expected(("hidden",), tensor_cores=True)


def _expected(op):
    return {
        f"_{op}_{kernel}{way}": of
        for kernel, of in (("step", _STEP), ("sequence", _SEQUENCE))
        for way in ("", "_backward")
    }


_GRU_CASES, _LSTM_CASES = _cases(3), _cases(4, **_CELL)

GRU = OpSpec(
    name="gru",
    folder="recurrent",
    formula="a GRU layer over a sequence: r, z = sigmoid(..), n = tanh(W x + r (W h + b)), h = n + z (h - n)",
    source="Cho et al. 2014, arXiv:1406.1078",
    library=GRU_LIBRARY,
    reference=_eager_gru,
    cases=_GRU_CASES,
    error_cases=_error_cases(3, _GRU_CASES[0].inputs),
    bench_cases=(
        Case("char_rnn-128x32x256-256", _inputs(128, 32, 256, 256, 3, given=False)),
        Case("timegan-24x128x24-24", _inputs(24, 128, 24, 24, 3, given=False)),
        Case("sketch_rnn-100x64x5-512", _inputs(100, 64, 5, 512, 3, given=False)),
    ),
    peers={"eager": _eager_gru},
    limits=Limits(_inputs(8, 32, 64, 256, 3, given=False), (57.4, 49), 1.05, 1.05),
    compiled=False,
    cost=_sequence_cost(4),
    compile_cases=_compile_cases(3),
    expected=_expected("gru"),
)
LSTM = OpSpec(
    name="lstm",
    folder="recurrent",
    formula="an LSTM layer over a sequence: c = f c + i g, h = o tanh(c)",
    source="Hochreiter & Schmidhuber 1997; gates: Gers et al. 2000",
    library=LSTM_LIBRARY,
    reference=_eager_lstm,
    cases=_LSTM_CASES,
    error_cases=(
        *_error_cases(4, _LSTM_CASES[0].inputs),
        _wrong(
            "cell", _LSTM_CASES[0].inputs, r"c0.*expected shape \(3, 5\).*got \(3, 4\)", c0=lambda t: t.normal(3, 4)
        ),
    ),
    bench_cases=(Case("char_rnn-128x32x256-256", _inputs(128, 32, 256, 256, 4, **_CELL, given=False)),),
    gpu_cases=tuple(
        Case(f"char_rnn-{t}x128x256-256", _inputs(t, 128, 256, 256, 4, **_CELL, given=False)) for t in (128, 512)
    ),
    peers={"eager": _eager_lstm},
    limits=Limits(_inputs(8, 32, 64, 256, 4, **_CELL, given=False), (54.9, 55.2), 1.05, 1.05),
    compiled=False,
    cost=_sequence_cost(5),
    compile_cases=_compile_cases(4, **_CELL),
    expected=_expected("lstm"),
    backends=("reference", "triton"),
)
