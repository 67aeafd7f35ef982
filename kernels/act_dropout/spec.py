"""act_dropout: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.act_dropout import reference
from genai_fast.kernels.act_dropout.schema import LIBRARY
from genai_fast.kernels.common.activations import ACTIVATIONS, activate
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of


def _reference(
    x, p=0.5, training=True, activation="leaky_relu", negative_slope=None, *, seed, offset=0, save_output=False
):
    seed = torch.as_tensor(seed, device=x.device) if training and p > 0 else None
    return reference.act_dropout(x, seed, p, offset, activation, negative_slope)


def _eager(inplace):
    def run(
        x, p=0.5, training=True, activation="leaky_relu", negative_slope=None, *, seed=None, offset=0, save_output=False
    ):
        """What people write: the activation module, then nn.Dropout."""
        return F.dropout(activate(x, activation, negative_slope), p, training, inplace)

    return run


def _cost(x, *settings, **more):
    # Forward reads x and writes y; backward reads dy and x and writes dx. A word is about 30 operations, drawn twice.
    return Cost(flops=70 * x.numel(), bytes=5 * x.numel() * x.element_size())


def _inputs(*shape, layout="contiguous", seed=1234, **more):
    def make(t):
        x = t.laid_out(layout, *shape, scale=2.0)
        return dict(x=x, seed=t.seed(seed), **more)

    return make


def _bench(*shape, **more):
    """Each call draws its own seed, as a training step does."""
    return lambda t: dict(x=t.normal(*shape), **more)


def _special(t):
    values = [0.0, -0.0, 80.0, -80.0, float("inf"), -float("inf"), float("nan"), 1e-30]
    return dict(x=t.values([[v] * 8 for v in values]), seed=t.seed(10))


CASES = (
    Case("discriminator", _inputs(8, 16, 8, 8, p=0.25)),
    Case("channels_last", _inputs(8, 24, 9, 7, layout="channels_last", p=0.3)),
    Case("odd", _inputs(3, 5, 7)),
    Case("second_order", _inputs(3, 5, 7, activation="silu")),
    Case("scalar", _inputs()),
    Case("vector", _inputs(7, p=0.3)),
    Case("one_element", _inputs(1, 1, p=0.1)),
    Case("long_row", _inputs(2, 9001, activation="relu")),
    Case("offset_1", _inputs(9, 20, offset=1, activation="tanh")),
    Case("offset_2_channels_last", _inputs(2, 5, 33, 31, layout="channels_last", offset=2, activation="silu")),
    Case("offset_past_2_32", _inputs(3, 37, offset=2**32 * 4 - 50)),
    Case("negative_seed", _inputs(4, 33, seed=-(2**62) - 3)),
    Case("keep_all", _inputs(4, 33, p=0.0)),
    Case("keep_nearly_all", _inputs(4, 33, p=1e-12)),
    Case("drop_all", _inputs(4, 33, p=1.0)),
    Case("drop_nearly_all", _inputs(40, 33, p=0.97)),
    Case("drop_half_of_relu", _inputs(40, 33, p=0.5, activation="relu", negative_slope=0.0)),
    Case("eval", _inputs(4, 6, 5, 5, training=False)),
    Case("strided", _inputs(4, 6, 5, 5, layout="strided")),
    Case("transposed", _inputs(9, 13, layout="transposed")),
    Case("negative_slope_below_0", _inputs(4, 6, 5, 5, negative_slope=-0.5)),
    Case("empty", _inputs(0, 6, 5)),
    Case("special_values", _special),
    *(Case(f"all_{name}", _inputs(5, 4, 6, 6, activation=name)) for name in ACTIVATIONS),
    *(
        Case(f"saved_output_{name}", _inputs(5, 4, 6, 6, activation=name, save_output=True, layout="channels_last"))
        for name in ("leaky_relu", "tanh", "sigmoid")
    ),
)

_GOOD = _inputs(4, 6, 5, 5)
ERROR_CASES = (
    ErrorCase("p_above_1", lambda t: {**_GOOD(t), "p": 1.5}, ValueError, r"p: expected .*\[0, 1\].*got 1\.5"),
    ErrorCase("p_below_0", lambda t: {**_GOOD(t), "p": -0.1}, ValueError, r"p: expected .*\[0, 1\].*got -0\.1"),
    ErrorCase("p_nan", lambda t: {**_GOOD(t), "p": float("nan")}, ValueError, r"p: expected .*\[0, 1\].*got nan"),
    ErrorCase("p_type", lambda t: {**_GOOD(t), "p": "0.5"}, TypeError, r"p: expected a float.*got str"),
    ErrorCase("integers", lambda t: dict(x=torch.ones(4, dtype=torch.int32)), TypeError,
              r"x.*floating.*got torch\.int32"),
    ErrorCase("activation", lambda t: {**_GOOD(t), "activation": "leaky"}, ValueError,
              r"activation.*'leaky_relu'.*got 'leaky'"),
    ErrorCase("slope", lambda t: {**_GOOD(t), "negative_slope": "0.2"}, ValueError, r"negative_slope.*got '0.2'"),
    ErrorCase("seed_type", lambda t: {**_GOOD(t), "seed": 1.5}, TypeError, r"seed.*expected.*got float"),
    ErrorCase("seed_device", lambda t: {**_GOOD(t), "seed": torch.zeros((), dtype=torch.int64, device="meta")},
              ValueError, r"seed.*expected device cpu as x has, got meta"),
    ErrorCase("offset_negative", lambda t: {**_GOOD(t), "offset": -1}, ValueError, r"offset.*>= 0.*got -1"),
    ErrorCase("saved_output_slope", lambda t: {**_GOOD(t), "negative_slope": -1.0, "save_output": True}, ValueError,
              r"save_output.*expected False.*leaky_relu.*negative_slope -1\.0.*got True"),
    ErrorCase("saved_output_silu", lambda t: {**_GOOD(t), "activation": "silu", "save_output": True}, ValueError,
              r"save_output.*expected False.*silu.*got True"),
)  # fmt: skip

BENCH_CASES = (
    Case("dcgan_64-64x64x32x32", _bench(64, 64, 32, 32, p=0.25)),
    Case("dcgan_mnist-128x128x14x14", _bench(128, 128, 14, 14, p=0.3)),
    Case("dcgan_mnist-128x128x14x14-half", _bench(128, 128, 14, 14, p=0.5)),
)

_COMPILE_CASES = (
    CompileCase("saved_output", _bench(64, 64, 32, 32, p=0.25, save_output=True), ("fp32", "bf16")),
    CompileCase("saved_relu", _bench(64, 64, 32, 32, p=0.25, activation="relu", save_output=True), ("fp32",)),
)
_EXPECTED = dict.fromkeys(
    ("_act_dropout_forward", "_act_dropout_backward"), Expected(("count",), lambda c: c["BLOCK"], 40)
)

_CHOICES = choices_of(BLOCK=(512, 512, 2048, 2048, 4096), num_warps=(2, 4, 4, 8, 8))

ACT_DROPOUT = OpSpec(
    name="act_dropout",
    folder="act_dropout",
    formula="activation(x) keep / (1 - p), keep drawn again in backward",
    source="Srivastava et al. 2014, JMLR 15; Philox: Salmon et al. 2011",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_inputs(8, 64, 32, 32, p=0.25), (46.3, 47.2), 0.9, 1.05),
    peers={"eager": _eager(False), "eager (inplace)": _eager(True)},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    choices=dict.fromkeys(("act_dropout/forward", "act_dropout/backward"), _CHOICES),
)
