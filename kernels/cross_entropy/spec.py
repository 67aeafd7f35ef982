"""cross_entropy: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.schema import wide_dtype
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of
from genai_fast.kernels.cross_entropy.schema import ROWS_LIBRARY

ALL_OUTPUTS = dict(return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True)


def definition(
    logits, target, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", inplace=False,
    class_weight=None, softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False,
):  # fmt: skip
    """F.cross_entropy in float32 or wider, and the penalty by its formula."""
    x, t = logits.to(wide_dtype(logits)).reshape(-1, logits.size(-1)), target.reshape(-1)
    predicted = x.argmax(-1)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    w = class_weight if class_weight is None else class_weight.to(x.dtype)
    loss = F.cross_entropy(x, t, w, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    counted = t != ignore_index
    number = counted.sum() if reduction == "mean" else 1
    penalty = z_loss * torch.where(counted, torch.logsumexp(x, -1) ** 2, 0.0)
    penalty = penalty.view(target.shape) if reduction == "none" else penalty.sum() / number
    loss = loss.view(target.shape) if reduction == "none" else loss
    loss = loss + penalty if z_loss else loss
    if not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss
    right = ((predicted == t) & counted).float()
    right = right.view(target.shape) if reduction == "none" else right.sum() / counted.sum()
    return (
        loss,
        penalty.detach() if return_z_loss else None,
        right if return_token_accuracy else None,
        predicted.masked_fill(~counted, -1).view(target.shape) if return_predicted_tokens else None,
    )


def _eager(logits, target, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", inplace=False):
    """What people write."""
    return F.cross_entropy(
        logits.flatten(0, -2),
        target.flatten(),
        None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def _cost(logits, target, **settings):
    # Forward reads the logits; backward reads them again and writes their gradient.
    return Cost(flops=40 * logits.numel(), bytes=3 * logits.numel() * logits.element_size())


def targets(t, *shape, classes, ignored=0.0, ignore_index=-100):
    """Classes drawn at random, and a share of positions that do not count."""
    drawn = torch.randint(classes, shape, generator=t.generator)
    drawn[torch.rand(shape, generator=t.generator) < ignored] = ignore_index
    return drawn.to(t.device)


def _inputs(*shape, scale=3.0, ignored=0.0, ignore_index=-100, **more):
    settings = more if ignore_index == -100 else dict(more, ignore_index=ignore_index)

    def make(t):
        logits = t.normal(*shape, scale=scale)
        target = targets(t, *shape[:-1], classes=shape[-1], ignored=ignored, ignore_index=ignore_index)
        return dict(logits=logits, target=target, **settings)

    return make


def weighted(make):
    """The same with a weight for each class, the first of them 0."""

    def with_weights(t):
        given = make(t)
        classes = given["weight"].size(0) if "weight" in given else given["logits"].size(-1)
        weights = t.uniform(classes, low=0.5, high=2.0)
        weights[0] = 0.0
        return {**given, "class_weight": weights}

    return with_weights


def _strided(t):
    """Rows with a gap between them."""
    x = t.normal(7, 50, grad=False)
    return dict(logits=x[:, 3:40].requires_grad_(), target=targets(t, 7, classes=37))


def _next_token(t):
    """Logits of all but the last position, as the loss of a language model takes them."""
    x = t.normal(3, 6, 37, grad=False)
    return dict(logits=x[:, :-1].requires_grad_(), target=targets(t, 3, 5, classes=37, ignored=0.2))


def _classes_second(t):
    """[B, V, T] transposed: the classes do not lie dense."""
    x = t.normal(3, 37, 6, grad=False)
    return dict(logits=x.transpose(1, 2).requires_grad_(), target=targets(t, 3, 6, classes=37))


def _special(t):
    inf, nan = float("inf"), float("nan")
    x = [
        [-inf, 0.5, 1.0, -inf, 2.0], [1e4, 1e4 - 2, 0.0, 1.0, -1e4], [-1e4, -1e4 + 1, -1e4, -3e4, -2e4],
        [nan, 0.0, 1.0, 2.0, 3.0], [inf, 0.0, 1.0, 2.0, 3.0], [-inf] * 5, [100.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, -0.0, 1e-30, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, -inf],
    ]  # fmt: skip
    return dict(logits=t.values(x), target=torch.tensor([2, 0, 1, 1, 1, 0, 3, 4, 4], device=t.device), reduction="none")


def _masked_blocks(t):
    """Whole blocks of a long row are masked, at its start, in its middle or at its end, or hold a NaN alone."""
    x = torch.randn(5, 9000, generator=t.generator)
    x[0, :5000], x[1, 2500:8000], x[2, 4000:], x[3, :6000] = (-float("inf"),) * 4
    x[3, 17] = float("nan")
    x[4, 8999] = 60.0  # the largest comes last
    return dict(
        logits=t.values(x.tolist()), target=torch.tensor([8000, 3, 100, 7000, 5], device=t.device), reduction="none"
    )


CASES = (
    Case("gpt", _inputs(40, 65)),
    Case("none", _inputs(4, 9, 65, reduction="none", ignored=0.2)),
    Case("odd", _inputs(5, 7, ignored=0.3)),
    Case("long_row", _inputs(3, 9001)),
    Case("many_rows", _inputs(64, 300, ignored=0.1)),
    Case("gpt2", _inputs(2, 50257)),
    Case("bytes", _inputs(9, 256, ignored=0.2)),
    Case("sum", _inputs(6, 130, reduction="sum", ignored=0.3)),
    Case("one_element", _inputs(1, 1)),
    Case("one_row", _inputs(33)),
    Case("two_classes", _inputs(9, 2, scale=30.0)),
    Case("smoothing", _inputs(6, 130, label_smoothing=0.1, ignored=0.2)),
    Case("smoothing_none", _inputs(3, 4, 4100, label_smoothing=0.3, reduction="none", ignored=0.2)),
    Case("smoothing_1", _inputs(6, 33, label_smoothing=1.0)),
    Case("z_loss", _inputs(6, 130, z_loss=1e-2, ignored=0.2)),
    Case("z_loss_none", _inputs(2, 5, 2049, z_loss=0.1, reduction="none", ignored=0.2)),
    Case("second_order", _inputs(4, 5, label_smoothing=0.2, z_loss=0.05, ignored=0.2, scale=1.0)),
    Case("gaussian_none", _inputs(3, 2, 4, reduction="none", scale=1.0)),
    Case("ignore_a_class", _inputs(50, 11, ignored=0.3, ignore_index=7, label_smoothing=0.1)),
    Case("large", _inputs(6, 300, scale=1000.0)),
    Case("four_dimensions", _inputs(2, 3, 2, 17)),
    Case("strided", _strided),
    Case("next_token", _next_token),
    Case("classes_second", _classes_second),
    Case("all_ignored", lambda t: {**_inputs(6, 9)(t), "target": torch.full((6,), -100, device=t.device)}),
    Case(
        "all_ignored_sum",
        lambda t: {**_inputs(6, 9, reduction="sum")(t), "target": torch.full((6,), -100, device=t.device)},
    ),
    Case("capped", _inputs(6, 130, softcap=4.0, ignored=0.2)),
    Case("weighted", weighted(_inputs(6, 130, ignored=0.2))),
    Case("capped_long", _inputs(3, 4100, softcap=30.0, label_smoothing=0.1, z_loss=1e-2, scale=20.0)),
    Case("weighted_smoothing", weighted(_inputs(6, 130, label_smoothing=0.1, z_loss=0.1, ignored=0.2))),
    Case("outputs", _inputs(6, 130, z_loss=0.1, ignored=0.2, **ALL_OUTPUTS)),
    Case(
        "weighted_capped_none",
        weighted(
            _inputs(
                2, 5, 37, label_smoothing=0.2, softcap=3.0, z_loss=0.1, ignored=0.2, reduction="none", **ALL_OUTPUTS
            )
        ),
    ),
    Case("outputs_long", weighted(_inputs(3, 9001, softcap=2.0, reduction="sum", **ALL_OUTPUTS))),
    Case("target_gradient", weighted(_inputs(4, 5, label_smoothing=0.2, z_loss=0.05, softcap=2.0, ignored=0.2))),
    Case("empty", _inputs(0, 9, reduction="sum")),
    Case("empty_mean", _inputs(3, 0, 9)),
    Case("empty_none", _inputs(0, 9, reduction="none")),
    Case("special_values", _special),
    Case("special_values_smoothing", lambda t: dict(_special(t), label_smoothing=0.1, z_loss=0.01)),
    Case("masked_blocks", _masked_blocks),
)

_GOOD = _inputs(4, 9)


def _view_of_a_leaf(t):
    return dict(logits=t.normal(2, 2, 9).view(4, 9), target=targets(t, 4, classes=9), inplace=True)


def _out_of_range(value):
    return lambda t: {**_GOOD(t), "target": torch.tensor([0, value, 8, -100])}


ERROR_CASES = (
    ErrorCase("target_shape", lambda t: {**_GOOD(t), "target": targets(t, 5, classes=9)}, ValueError,
              r"target.*expected shape \(4,\).*got \(5,\)"),
    ErrorCase("target_dtype", lambda t: {**_GOOD(t), "target": torch.zeros(4, dtype=torch.int32)}, TypeError,
              r"target.*expected torch\.int64.*got torch\.int32"),
    ErrorCase("target_probabilities", lambda t: {**_GOOD(t), "target": t.uniform(4, 9)}, TypeError,
              r"target.*expected torch\.int64.*got torch\.float32"),
    ErrorCase("target_list", lambda t: {**_GOOD(t), "target": [0, 1, 2, 3]}, TypeError,
              r"target.*expected a tensor.*got list"),
    ErrorCase("target_too_large", _out_of_range(9), ValueError,
              r"target.*expected classes from 0 to 8 or -100.*got 9"),
    ErrorCase("target_negative", _out_of_range(-1), ValueError,
              r"target.*expected classes from 0 to 8 or -100.*got -1"),
    ErrorCase("device", lambda t: {**_GOOD(t), "target": targets(t, 4, classes=9).to("meta")}, ValueError,
              r"target.*expected device.*got meta"),
    ErrorCase("integers", lambda t: {**_GOOD(t), "logits": torch.ones(4, 9, dtype=torch.int32)}, TypeError,
              r"logits.*floating.*got torch\.int32"),
    ErrorCase("no_dimension", lambda t: dict(logits=t.normal(), target=torch.tensor(0)), ValueError,
              r"logits.*\[\.\.\., V\].*got shape \(\)"),
    ErrorCase("no_classes", lambda t: dict(logits=t.normal(4, 0), target=torch.zeros(4, dtype=torch.int64)), ValueError,
              r"logits.*at least one class.*got shape \(4, 0\)"),
    ErrorCase("smoothing", lambda t: {**_GOOD(t), "label_smoothing": 1.5}, ValueError,
              r"label_smoothing.*\[0, 1\].*got 1\.5"),
    ErrorCase("z_loss", lambda t: {**_GOOD(t), "z_loss": -1.0}, ValueError, r"z_loss.*>= 0.*got -1\.0"),
    ErrorCase("z_loss_type", lambda t: {**_GOOD(t), "z_loss": "0"}, TypeError, r"z_loss.*expected a float.*got str"),
    ErrorCase("softcap", lambda t: {**_GOOD(t), "softcap": 0.0}, ValueError, r"softcap.*above 0.*got 0\.0"),
    ErrorCase("softcap_nan", lambda t: {**_GOOD(t), "softcap": float("nan")}, ValueError, r"softcap.*above 0.*got nan"),
    ErrorCase("class_weight", lambda t: {**_GOOD(t), "class_weight": t.uniform(8)}, ValueError,
              r"class_weight.*expected shape \(9,\).*got \(8,\)"),
    ErrorCase("class_weight_list", lambda t: {**_GOOD(t), "class_weight": [1.0] * 9}, TypeError,
              r"class_weight.*expected a tensor.*got list"),
    ErrorCase("class_weight_device", lambda t: {**_GOOD(t), "class_weight": t.uniform(9).to("meta")}, ValueError,
              r"class_weight.*expected device.*got meta"),
    ErrorCase("class_weight_gradient", lambda t: {**_GOOD(t), "class_weight": t.uniform(9, grad=True)}, ValueError,
              r"class_weight.*without a gradient.*detach"),
    ErrorCase("return_z_loss", lambda t: {**_GOOD(t), "return_z_loss": "yes"}, TypeError,
              r"return_z_loss: expected a bool"),
    ErrorCase("ignore_index", lambda t: {**_GOOD(t), "ignore_index": None}, TypeError,
              r"ignore_index.*expected an int.*got NoneType"),
    ErrorCase("reduction", lambda t: {**_GOOD(t), "reduction": "avg"}, ValueError,
              r"reduction.*'mean', 'sum', 'none', got 'avg'"),
    ErrorCase("inplace_leaf", lambda t: {**_GOOD(t), "inplace": True}, ValueError, "inplace.*expected.*got a leaf"),
    ErrorCase("inplace_view", _view_of_a_leaf, ValueError, r"inplace.*expected logits that an operation made.*view"),
)  # fmt: skip

BENCH_CASES = (
    Case("gpt2-512x50257", _inputs(512, 50257)),
    Case("gpt_char-4096x65", _inputs(4096, 65)),
    Case("gpt_bytes-4096x256", _inputs(4096, 256)),
    Case("llama-256x128256", _inputs(256, 128256)),
)

_COMPILE_CASES = (
    CompileCase("gpt2-512x50257-smooth", _inputs(512, 50257, label_smoothing=0.1)),
    CompileCase("gemma-256x256000-capped", _inputs(256, 256000, softcap=30.0, **ALL_OUTPUTS)),
    CompileCase("gpt2-512x50257-weighted", weighted(_inputs(512, 50257, label_smoothing=0.1, z_loss=1e-4))),
)
_EXPECTED = dict.fromkeys(  # rows of 50257 begin anywhere, those of 128256 at multiples of 16 bytes
    ("_cross_entropy_forward", "_cross_entropy_backward"), Expected(("inner_stride",), lambda c: c["BLOCK"])
)

CROSS_ENTROPY = OpSpec(
    name="cross_entropy",
    folder="cross_entropy",
    formula="(1 - e) (lse - x[target]) + e (lse - mean x) + z lse^2 over the last dimension, lse = logsumexp(x); also"
    " with class weights, and of capped logits",
    source="online sums: Milakov & Gimelshein 2018, arXiv:1805.02867; smoothing: Szegedy et al. 2015; z: PaLM 2022",
    library=ROWS_LIBRARY,
    reference=definition,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_inputs(16, 50257), (10.9, 0.0025, 17.7), 1.72, 1.05),
    gpu_cases=(Case("gpt2-8192x50257", _inputs(8192, 50257)),),
    peers={"eager": _eager},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    choices={
        "cross_entropy/forward": choices_of(BLOCK=(2048, 4096, 8192, 8192), num_warps=(4, 16, 8, 16)),
        "cross_entropy/backward": choices_of(BLOCK=(1024, 2048, 4096, 4096), num_warps=(4, 8, 4, 8)),
    },
)
