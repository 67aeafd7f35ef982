"""adam_step: what the op is, its cases and its cost."""

from torch.optim.adam import adam

from genai_fast.kernels.adam import reference
from genai_fast.kernels.adam.schema import LIBRARY
from genai_fast.kernels.common.spec import Case, Cost, ErrorCase, OpSpec

_DEFAULTS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False)


def _reference(params, grads, exp_avgs, exp_avg_sqs, steps, **settings):
    s = {**_DEFAULTS, **settings}
    new = reference.updated(
        params, grads, exp_avgs, exp_avg_sqs, steps, s["lr"], *s["betas"], s["eps"], s["weight_decay"], s["decoupled"]
    )
    return [x for values in new for x in values]


def _inputs(*shapes, step=3, **more):
    def make(t):
        draw = lambda scale: [t.normal(*shape, scale=scale, grad=False) for shape in shapes]  # noqa: E731
        squares = [x * x for x in draw(0.1)]
        steps = [t.values(step - 1, grad=False) for _ in shapes]
        return dict(params=draw(1.0), grads=draw(0.1), exp_avgs=draw(0.1), exp_avg_sqs=squares, steps=steps, **more)

    return make


def _optimizer_step(**settings):
    """torch.optim.Adam on the same tensors."""

    def step(params, grads, exp_avgs, exp_avg_sqs, steps):
        adam(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, beta1=0.9, beta2=0.999, lr=1e-3,
            weight_decay=0.0, eps=1e-8, maximize=False, **settings,
        )  # fmt: skip
        return params

    return step


def _cost(params, grads, exp_avgs, exp_avg_sqs, steps, **settings):
    count = sum(p.numel() for p in params)
    return Cost(flops=15 * count, bytes=7 * 4 * count)  # reads four arrays, writes three


CASES = (
    Case("one", _inputs((1,))),
    Case("first_step", _inputs((3, 5), (7,), step=1)),
    Case("many", _inputs((400, 784), (400,), (20, 400), (), (0, 3), (33, 1, 2))),
    Case("weight_decay", _inputs((65, 3), (9,), weight_decay=0.1)),
    Case("decoupled", _inputs((65, 3), (9,), weight_decay=0.1, decoupled=True, betas=(0.5, 0.99), eps=1e-6, lr=0.01)),
    Case("late", _inputs((130,), step=100000)),
)

_GOOD = _inputs((4, 3))
ERROR_CASES = (
    ErrorCase("lengths", lambda t: {**_GOOD(t), "grads": []}, ValueError, r"grads.*expected 1 tensors.*got 0"),
    ErrorCase("shape", lambda t: {**_GOOD(t), "grads": [t.normal(4)]}, ValueError, r"grads\[0\].*\(4, 3\).*got \(4,\)"),
    ErrorCase("dtype", lambda t: {**_GOOD(t), "grads": [t.normal(4, 3).double()]}, TypeError, r"grads\[0\].*float64"),
    ErrorCase(
        "strides",
        lambda t: {**_GOOD(t), "params": [t.normal(3, 4, grad=False).t()]},
        ValueError,
        r"params\[0\].*contiguous",
    ),
    ErrorCase("steps", lambda t: {**_GOOD(t), "steps": [t.normal(1)]}, ValueError, r"steps\[0\].*\(\).*got \(1,\)"),
)

_VAE = ((400, 784), (400,), (20, 400), (20,), (20, 400), (20,), (400, 20), (400,), (784, 400), (784,))

ADAM_STEP = OpSpec(
    name="adam_step",
    folder="adam",
    formula="p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), all tensors in one call",
    source="Kingma & Ba 2014, arXiv:1412.6980; decoupled decay: Loshchilov & Hutter 2017",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=(Case("vae_mnist-652k", _inputs(*_VAE)),),
    peers={"eager": _optimizer_step(foreach=False), "eager (fused=True)": _optimizer_step(fused=True)},
    cost=_cost,
    backends=("reference", "cpu"),
    double_backward=False,
)
