"""linear_cross_entropy: a linear layer and its cross-entropy, by chunks of rows."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.spec import Case, Cost, ErrorCase, Limits, OpSpec
from genai_fast.kernels.cross_entropy import spec
from genai_fast.kernels.cross_entropy.schema import LINEAR_LIBRARY


def _reference(x, weight, target, bias=None, *, chunk=None, token_scaling=False, **settings):
    logits = F.linear(x, weight, bias)
    if not token_scaling:
        return spec.definition(logits, target, **settings)
    reduction = settings.pop("reduction", "mean")  # of single losses, since those are scaled
    found = spec.definition(logits, target, reduction="none", **settings)
    capped = logits if (c := settings.get("softcap")) is None else c * torch.tanh(logits / c)
    factors = (-F.cross_entropy(capped.flatten(0, -2), target.flatten(), reduction="none")).exp().detach()
    loss = found * factors.view(target.shape)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / (target != -100).sum()


def _eager(x, weight, target, bias=None, *, chunk=None, **settings):
    """What people write."""
    return F.cross_entropy(F.linear(x, weight, bias).flatten(0, -2), target.flatten(), **settings)


def _cost(x, weight, target, bias=None, **settings):
    # Three matrix products; x and the weight are read twice, their gradients written.
    logits = x.numel() // x.size(-1) * weight.size(0)
    return Cost(flops=logits * (6 * weight.size(1) + 40), bytes=3 * (x.numel() + weight.numel()) * x.element_size())


def _inputs(*shape, classes, ignored=0.0, bias=True, **more):
    def make(t):
        x = t.normal(*shape)
        weight = t.normal(classes, shape[-1], scale=2.0 * shape[-1] ** -0.5)
        target = spec.targets(t, *shape[:-1], classes=classes, ignored=ignored)
        return dict(x=x, weight=weight, target=target, bias=t.normal(classes) if bias else None, **more)

    return make


def _strided(t):
    """All but the last position, and a weight that lies transposed."""
    x, weight = t.normal(3, 6, 8, grad=False), t.normal(8, 11, grad=False)
    return dict(
        x=x[:, :-1].requires_grad_(), weight=weight.t().requires_grad_(), target=spec.targets(t, 3, 5, classes=11)
    )


def _frozen_weight(t):
    inputs = _inputs(9, 8, classes=11, bias=False)(t)
    return {**inputs, "weight": inputs["weight"].detach()}


_GOOD = _inputs(4, 6, classes=9)

LINEAR_CROSS_ENTROPY = OpSpec(
    name="linear_cross_entropy",
    folder="cross_entropy",
    formula="cross_entropy(x weight^T + bias, target) by chunks of rows, so that the logits never exist as a whole",
    source="Wijmans et al. 2024, arXiv:2411.09009; chunks: Hsu et al. 2024, arXiv:2410.10989",
    library=LINEAR_LIBRARY,
    reference=_reference,
    cases=(
        Case("gpt", _inputs(40, 24, classes=65, bias=False, chunk=16)),
        Case("none", _inputs(4, 9, 16, classes=65, reduction="none", ignored=0.2, chunk=10)),
        Case("second_order", _inputs(5, 3, classes=4, ignored=0.2, label_smoothing=0.2, z_loss=0.05, chunk=2)),
        Case("odd", _inputs(7, 5, classes=11, ignored=0.3)),
        Case("many_rows", _inputs(80, 8, classes=300, ignored=0.1, chunk=60)),
        Case("sum", _inputs(3, 4, 6, classes=33, reduction="sum", label_smoothing=0.1, z_loss=1e-2, chunk=5)),
        Case("one_element", _inputs(1, 1, classes=1)),
        Case("vector", _inputs(6, classes=33)),
        Case("chunk_of_one", _inputs(6, 5, classes=33, chunk=1)),
        Case("strided", _strided),
        Case("frozen_weight", _frozen_weight),
        Case("capped", _inputs(9, 8, classes=33, softcap=2.0, z_loss=0.1, ignored=0.2, chunk=4)),
        Case("weighted", spec.weighted(_inputs(9, 8, classes=33, ignored=0.2, chunk=4))),
        Case("token_scaling", _inputs(9, 8, classes=33, token_scaling=True, z_loss=0.1, softcap=3.0, chunk=4)),
        Case(
            "outputs",
            spec.weighted(_inputs(9, 8, classes=33, z_loss=0.1, label_smoothing=0.1, ignored=0.2, chunk=4,
                                  **spec.ALL_OUTPUTS)),
        ),
        Case("outputs_none", _inputs(3, 4, 8, classes=33, reduction="none", z_loss=0.1, chunk=5, **spec.ALL_OUTPUTS)),
        Case(
            "target_gradient",
            spec.weighted(_inputs(5, 3, classes=4, label_smoothing=0.2, z_loss=0.05, softcap=2.0, chunk=2)),
        ),
        Case("empty", _inputs(0, 5, classes=9, reduction="sum")),
        Case("empty_none", _inputs(0, 5, classes=9, reduction="none")),
    ),
    error_cases=(
        ErrorCase("columns", lambda t: {**_GOOD(t), "weight": t.normal(9, 5)}, ValueError,
                  r"weight.*expected \[V, 6\].*got shape \(9, 5\)"),
        ErrorCase("weight_dtype", lambda t: {**_GOOD(t), "weight": t.normal(9, 6).double()}, TypeError,
                  r"weight.*expected torch\.float32.*got torch\.float64"),
        ErrorCase("weight_device", lambda t: {**_GOOD(t), "weight": t.normal(9, 6).to("meta")}, ValueError,
                  r"weight.*expected device.*got meta"),
        ErrorCase("bias", lambda t: {**_GOOD(t), "bias": t.normal(8)}, ValueError,
                  r"bias.*expected shape \(9,\).*got \(8,\)"),
        ErrorCase("target_shape", lambda t: {**_GOOD(t), "target": spec.targets(t, 5, classes=9)}, ValueError,
                  r"target.*expected shape \(4,\).*got \(5,\)"),
        ErrorCase("target_too_large", lambda t: {**_GOOD(t), "target": spec.targets(t, 4, classes=1) + 9}, ValueError,
                  r"target.*expected classes from 0 to 8.*got 9"),
        ErrorCase("no_dimension", lambda t: {**_GOOD(t), "x": t.normal()}, ValueError,
                  r"x.*\[\.\.\., D\].*got shape \(\)"),
        ErrorCase("no_classes", lambda t: {**_GOOD(t), "weight": t.normal(0, 6), "bias": None}, ValueError,
                  r"weight.*at least one class.*got shape \(0, 6\)"),
        ErrorCase("chunk", lambda t: {**_GOOD(t), "chunk": 0}, ValueError, r"chunk.*at least 1, got 0"),
        ErrorCase("chunk_type", lambda t: {**_GOOD(t), "chunk": 0.5}, TypeError, r"chunk.*expected an int"),
        ErrorCase("smoothing", lambda t: {**_GOOD(t), "label_smoothing": -0.5}, ValueError,
                  r"label_smoothing.*\[0, 1\].*got -0\.5"),
        ErrorCase("softcap", lambda t: {**_GOOD(t), "softcap": -1.0}, ValueError, r"softcap.*above 0.*got -1\.0"),
        ErrorCase("class_weight", lambda t: {**_GOOD(t), "class_weight": t.uniform(8)}, ValueError,
                  r"class_weight.*expected shape \(9,\).*got \(8,\)"),
        ErrorCase("token_scaling", lambda t: {**_GOOD(t), "token_scaling": 2}, TypeError, r"token_scaling: .*bool"),
        ErrorCase("reduction", lambda t: {**_GOOD(t), "reduction": "avg"}, ValueError,
                  r"reduction.*'mean', 'sum', 'none', got 'avg'"),
    ),
    bench_cases=(
        Case("gpt2-512x768-50257", _inputs(512, 768, classes=50257, bias=False)),
        Case("gpt_char-4096x384-65", _inputs(4096, 384, classes=65, bias=False)),
    ),
    peers={"eager": _eager},
    limits=Limits(_inputs(64, 128, classes=1000, bias=False), (10, 10.7), 1, 1.05),
    cost=_cost,
)  # fmt: skip
