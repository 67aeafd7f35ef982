"""The C++ kernels on calls that no public op makes, and on odd layouts: for sanitizers, and a few for each test run.

    python tests/native_fuzz.py [--extension FILE] [--seed N] [--count N] [--numerics]

prints each call that ends the process before it is made, and raises on wrong numbers. `make asan` runs it.
"""

import argparse
import importlib.util
import random
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = (-(2**63), -1, 0, 1, 3, 7, 2**31, 2**62, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e30)


def load(extension):
    """Take this file for genai_fast._cpu."""
    sys.path.insert(0, str(ROOT))
    import torch  # noqa: F401  (first: the extension then shares torch's OpenMP runtime)

    if extension:
        spec = importlib.util.spec_from_file_location("genai_fast._cpu", extension)
        sys.modules["genai_fast._cpu"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def laid_out(x, rng):
    """The same numbers in other memory: turned, spread, behind an offset, or as they are."""
    import torch

    kind = rng.randrange(5) if x.dim() else 0
    if kind == 1:
        order = rng.sample(range(x.dim()), x.dim())
        x = x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    elif kind == 2:
        dim = rng.randrange(x.dim())
        x = x.repeat_interleave(2, dim).unflatten(dim, (-1, 2)).select(dim + 1, 1)
    elif kind == 3:
        x = torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape)
    elif kind == 4 and x.dim() > 1:
        x = torch.cat((x, x), -1)[..., : x.size(-1)]
    return x


def calls_of_cases(rng, each=6):
    """(name, arguments) of each call of a C++ implementation that `each` cases of every op make, with gradients."""
    import torch

    from genai_fast import ops, use_backend
    from genai_fast.kernels.common.spec import Tensors
    from genai_fast.ops import dispatch
    from genai_fast.registry import OPS
    from genai_fast.testing import _evaluate

    made, select = [], dispatch.select

    def recording(name, *where):
        function = select(name, *where)

        def call(*arguments):
            made.append((name, arguments))
            return function(*arguments)

        return call

    dispatch.select = recording
    try:
        for op in (op for op in OPS.values() if "cpu" in op.backends):
            for case in rng.sample(op.cases, min(each, len(op.cases))):
                with use_backend("cpu"):
                    function = getattr(ops, op.name)
                    outputs, _ = _evaluate(op, function, case.inputs(Tensors()))
                    upstream = [torch.randn_like(y) if y.is_floating_point() else y for y in outputs]
                    _evaluate(op, function, case.inputs(Tensors()), upstream)
    finally:
        dispatch.select = select
    return made


def changed(x, rng):
    """Something else in an argument's place."""
    import torch

    if isinstance(x, torch.Tensor):
        dim = rng.randrange(x.dim()) if x.dim() else None
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
        kind = rng.randrange(9)
        if kind == 0:
            return x.to(rng.choice(dtypes))
        if kind == 1 and dim is not None and x.size(dim):
            return x.narrow(dim, 0, rng.randrange(x.size(dim)))
        if kind == 2 and dim is not None:
            return torch.cat((x, x), dim)
        if kind == 3:
            return x.unsqueeze(0) if rng.random() < 0.5 else x.flatten()
        if kind == 4 and dim is not None and x.size(dim):
            return x.select(dim, 0).unsqueeze(dim).expand(x.shape)
        if kind == 5 and not x.is_floating_point() and x.dtype is not torch.bool:
            return x + rng.choice((-1, 1, 5, 2**20, -(2**31), 2**31, 2**32, 2**40))
        if kind == 6:
            return torch._efficientzerotensor(x.shape, dtype=x.dtype)
        if kind == 7:
            return None
        return laid_out(x, rng)
    if isinstance(x, (list, tuple)) and x:
        k = rng.randrange(len(x))
        return [*x[:k], *([changed(x[k], rng)] if rng.random() < 0.8 else []), *x[k + 1 :]]
    if isinstance(x, bool):
        return not x
    if isinstance(x, int):
        return rng.choice(NUMBERS)
    if isinstance(x, float):
        return rng.choice(FLOATS)
    return x


def copied(x):
    """Calls write in place, and must not be seen by the next one."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    return [copied(item) for item in x] if isinstance(x, list) else x


def hostile(calls, rng, count, told):
    """Calls with one or two arguments changed: each is refused in words, or served. How many were refused."""
    import torch

    refused = 0
    for n in range(count):
        name, arguments = rng.choice(calls)
        arguments = [copied(x) for x in arguments]
        try:
            for k in rng.sample(range(len(arguments)), rng.randint(1, 2)):
                arguments[k] = changed(arguments[k], rng)
        except RuntimeError:  # a change that this tensor does not take
            continue
        shown = [(x.dtype, tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x for x in arguments]
        told(f"{n} {name} {shown}")
        try:
            getattr(torch.ops.genai_fast, name)(*arguments, "cpu")
        except Exception:
            refused += 1
    return refused


def odd_shapes(rng, count, told):
    """Public ops on random shapes and layouts, against their reference in outputs and gradients."""
    import torch

    from genai_fast import ops, use_backend

    def normal(*shape, dense=False):
        x = laid_out(torch.randn(shape), rng)
        return (x.contiguous() if dense and x.stride(-1) != 1 else x).requires_grad_()

    def size(most):
        return rng.choice((1, 2, 3, rng.randint(1, most)))

    def attention():
        b, h, g, t, more, d = size(3), size(2), size(3), size(140), size(40), size(40)
        settings = {"window": rng.choice((None, 1, 5, 2**63 - 1)), "softcap": rng.choice((None, 3.0))}
        kv = [normal(b, h, t + more, d, dense=True) for _ in range(2)]
        q = normal(b, h * g, t, d, dense=True)
        return ops.causal_attention, (q, *kv), {**settings, "causal": rng.random() < 0.7}

    def packed():
        t, d = rng.randint(1, 90), size(24)
        cuts = [0, *sorted(rng.randint(0, t) for _ in range(3)), t]
        q, k, v = (normal(1, 2, t, d, dense=True) for _ in range(3))
        return ops.causal_attention, (q, k, v), {"cu_seqlens_q": torch.tensor(cuts, dtype=torch.int32)}

    def planes(op, *tail):
        shape = (size(20), size(40), *(size(12) for _ in range(rng.randint(0, 2))))
        x = normal(*shape)
        return op, (x, *(normal(shape[1]) for _ in tail)), {}

    def rows(op):
        shape = (*(size(20) for _ in range(rng.randint(1, 2))), size(3000))
        return op, (normal(*shape), normal(shape[-1])), {}

    def entropy():
        n, classes = size(40), size(3000)
        target = torch.randint(classes, (n,)) if rng.random() < 0.8 else torch.full((n,), -100)
        return ops.cross_entropy, (normal(n, classes), target), {"reduction": rng.choice(("none", "sum"))}

    def latents():
        shape = (size(9), size(5000))
        return ops.reparameterize_kl, (normal(*shape), normal(*shape)), {"seed": 3, "offset": rng.choice((0, 5, 2**62))}

    def images():
        few, kernel, stride = size(4), size(5), rng.choice((1, 2))
        c, b = size(9), size(3)
        x, weight = normal(b, c, size(70), size(70)), normal(c, few, kernel, kernel)
        return ops.conv_transpose2d, (x, weight, normal(few)), {"stride": stride}

    def gates():
        return ops.swiglu, (normal(size(30), 2 * size(1500)),), {}

    def turned():
        t, d = size(60), 2 * size(20)
        cos, sin = ops.rotary_tables(t + 3, d)
        return ops.rotary, (normal(size(3), size(4), t, d + size(3)), cos, sin), {"offset": rng.choice((0, 3))}

    def groups():
        (x, *parameters), settings = planes(ops.batch_norm_act, 0, 0)[1:]
        scale, shift = normal(*x.shape[:2]), normal(*x.shape[:2])
        more = {"residual": normal(*x.shape), "scale": scale, "shift": shift} if rng.random() < 0.5 else {}
        return ops.instance_norm_act, (x, *parameters), {**settings, **more}

    kinds = (
        groups, attention, packed, entropy, latents, images, gates, turned,
        lambda: planes(ops.bias_act, 0), lambda: planes(ops.batch_norm_act, 0, 0), lambda: rows(ops.layer_norm),
        lambda: rows(ops.rms_norm),
    )  # fmt: skip
    for n in range(count):
        op, arguments, settings = rng.choice(kinds)()
        if op is ops.batch_norm_act and arguments[0].numel() <= arguments[0].size(1):
            continue
        told(f"{n} {op.__name__} {[(tuple(x.shape), x.stride()) for x in arguments]} {settings}")
        inputs, found = [x for x in arguments if x.requires_grad], []
        for backend in ("cpu", "reference"):
            with use_backend(backend):
                y = op(*arguments, **settings)
                y = y if isinstance(y, torch.Tensor) else y[0]
                upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(n))
                found.append([y.detach(), *torch.autograd.grad(y, inputs, upstream, allow_unused=True)])
        for ours, right in zip(*found, strict=True):
            scale = max(float(right.abs().max()), 1.0) if right.numel() else 1.0
            assert torch.allclose(ours, right, rtol=1e-3, atol=1e-3 * scale, equal_nan=True), op.__name__


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extension", help="the compiled extension, in place of the checkout's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000, help="of changed calls; a tenth of odd shapes")
    parser.add_argument("--numerics", action="store_true", help="all cases of the cpu backend in all dtypes, too")
    parser.add_argument("--quiet", action="store_true", help="do not print the calls")
    given = parser.parse_args(arguments)
    load(given.extension)
    import torch

    from genai_fast.backends import cpu_kernels
    from genai_fast.testing import assert_matches_reference, every_run

    warnings.simplefilter("ignore")
    torch.manual_seed(given.seed)
    rng, began = random.Random(given.seed), time.monotonic()
    told = (lambda text: None) if given.quiet else (lambda text: print(text, flush=True))
    runs = [run for run in every_run(("cpu",)) if run.backend == "cpu"] if given.numerics else []
    for run in runs:
        told(str(run))
        assert_matches_reference(run)
    odd_shapes(rng, given.count // 10, told)
    refused = hostile(calls_of_cases(rng), rng, given.count, told)
    print(
        f"{cpu_kernels()[1]}: {len(runs)} cases, {given.count // 10} odd shapes, {given.count} changed calls"
        f" ({refused} refused) in {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
