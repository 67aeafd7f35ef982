"""Random models against plain PyTorch: outputs, gradients, buffers, errors, layouts and random state under fuse.

    python -m bench.fuzz_chains --count 500 --seed 0     compare 500 models
    python -m bench.fuzz_chains --only 17                 one of them again, with its model and circumstances

A model runs as it is and as `fuse(copy)`, in circumstances drawn with it (mode, autocast, dtype, layout, checkpointing,
thresholds, the implementation of every convolution). Errors are measured against the same model in float64: 3 times
PyTorch's own, and what changes of weights and results by some roundings make of it. Exit code: 0 none, 1 differences.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench import random_models
from bench.random_models import Model
from genai_fast import autotune, fuse
from genai_fast.fusion import thresholds
from genai_fast.fusion.implementations import CONVOLUTIONS

SEEDS = 1_000_000  # chains of one --seed
FACTOR = 3.0  # of PyTorch's own error
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
_ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
# Roundings by which a model is changed, to see what it makes of them; gradients flip at kinks: for those the more.
_SHAKES = (1, 2, 3, 4, 4, 16, 64, 256, 256, 1024)
_FEW = 4
GARBAGE = 1e20  # an error that no rounding makes
KINK = 0.05  # of a gradient's 2-norm, if outputs agree: one element that passes a kink changes as much


class Circumstances(NamedTuple):
    """How a model is called."""

    training: bool
    grad: str  # "grad", "no_grad" or "inference"
    autocast: bool
    dtype: torch.dtype
    layout: str  # of the input: contiguous, channels_last, transposed, sliced, expanded
    leaf: bool  # whether the input is a leaf, which must not be changed in place
    input_gradient: bool
    checkpointed: bool
    changed: str  # what is done to the outputs in place
    ignored: bool  # thresholds
    implementation: str  # "measured", "drawn", or the name of one that is forced where it serves
    hooks: bool  # on every module
    penalty: bool  # whether the loss has the gradient of the input in it

    @staticmethod
    def draw(d: random.Random) -> Circumstances:
        return Circumstances(
            d.random() < 0.65, d.choice(("grad", "grad", "grad", "no_grad", "inference")), d.random() < 0.12,
            d.choice((*[torch.float32] * 8, torch.float64, torch.bfloat16)),
            d.choice(("contiguous", "contiguous", "channels_last", "transposed", "sliced", "expanded")),
            d.random() < 0.5, d.random() < 0.7, d.random() < 0.1, d.choice(("", "", "add_", "mul_", "relu_")),
            d.random() < 0.7, d.choice(("measured", "drawn", "drawn", *(option.name for option in CONVOLUTIONS))),
            d.random() < 0.04, d.random() < 0.08,
        )  # fmt: skip


class _Shaken(torch.autograd.Function):
    """x and its gradient, each element changed by the given number of roundings."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: float, noise: torch.Generator) -> torch.Tensor:
        ctx.size, ctx.noise = size, noise
        return x * (1 + size * torch.randn(x.shape, generator=noise, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Shaken.forward(ctx, grad, ctx.size, ctx.noise), None, None


class Result(NamedTuple):
    """What a model did: all that a program can see of it."""

    error: tuple[str, str]  # stage and type; "" if none
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    inputs: list[torch.Tensor]  # after the calls
    keys: list[str]
    random_state: torch.Tensor
    log: list[str]
    message: str


@contextlib.contextmanager
def _choosing(name: str, seed: int) -> Iterator[None]:
    """One implementation wherever it serves, one drawn at each choice, or the measured one."""
    draws, choose = random.Random(seed), autotune.choose
    made: dict[Any, str] = {}

    def chosen(family: Any, shape: Any, device: torch.device, candidates: Any) -> autotune.Choice:
        makers, default = candidates()
        if name == "drawn":
            wanted = made.setdefault((family, shape), draws.choice(sorted(makers)))
            return autotune.Choice(wanted if wanted in makers else default, {})
        return autotune.Choice(name if name in makers else default, {})

    autotune.forget()
    try:
        if name != "measured":
            autotune.choose = chosen
        yield
    finally:
        autotune.choose = choose
        autotune.forget()


def _shaken(y: Any, size: float, noise: torch.Generator) -> Any:
    return _Shaken.apply(y, size, noise) if isinstance(y, torch.Tensor) else y


def _laid_out(shape: tuple[int, ...], layout: str) -> torch.Tensor:
    x = torch.randn(shape)
    if layout == "channels_last" and len(shape) > 3:
        return x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    if layout == "transposed" and len(shape) > 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return x[:1].expand(shape) if layout == "expanded" else x


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy with its strides."""
    if 0 in x.stride():
        return x[:1].to(dtype).expand(x.shape)
    room = torch.zeros(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1, dtype=dtype)
    return room.as_strided(x.shape, x.stride()).copy_(x)


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _gradient_as_it_lies(norm: nn.Module, given: tuple[torch.Tensor], y: torch.Tensor) -> None:
    """Give backward a gradient in y's layout: of one sample and another layout PyTorch's computes wrong numbers."""
    if y.requires_grad and y.dim() == 4:
        layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last
        y.register_hook(lambda gradient: gradient.contiguous(memory_format=layout))


def _run(
    model: nn.Module, made: Model, how: Circumstances, x: torch.Tensor, seed: int, fused: bool, shake: float = 0.0,
    *, corrected: bool = True,
) -> Result:  # fmt: skip
    """Two training steps and an evaluation, or their like, of a copy.

    corrected: whether a plain model's instance norms are kept from PyTorch's wrong gradients.
    """
    exact = x.dtype is torch.float64 and how.dtype is not torch.float64
    dtype = torch.float64 if exact else how.dtype
    log: list[str] = []
    stage, error, message = "prepare", ("", ""), ""
    outputs: list[torch.Tensor] = []
    gradients: dict[str, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []
    model = copy.deepcopy(model)
    with contextlib.ExitStack() as stack:
        try:
            torch.manual_seed(seed)
            model.to(how.dtype)
            if fused:
                fuse(model)
            for norm in (
                () if fused or not corrected else filter(lambda m: isinstance(m, _INSTANCE_NORMS), model.modules())
            ):
                norm.register_forward_hook(_gradient_as_it_lies)
            for action in made.actions:
                action.do(model, log)
            if exact:
                model.double()
            model.train(how.training) if how.training is False else None
            if shake:
                noise = torch.Generator().manual_seed(round(shake * 2**60))
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1 + shake * torch.randn(p.shape, generator=noise, dtype=p.dtype))
                x = _like(x * (1 + shake * torch.randn(x.shape, generator=noise, dtype=x.dtype)), x.dtype)
                for m in model.modules():
                    if not m._modules:
                        m.register_forward_hook(lambda m, _, y: _shaken(y, shake, noise))
            if how.hooks:
                hook = nn.modules.module.register_module_forward_hook(lambda m, *_: log.append(type(m).__name__))
                stack.callback(hook.remove)
            for step in range(3 if how.training else 2):
                torch.manual_seed(seed + step)
                if step == 2:
                    model.eval()
                grad = how.grad
                given = _like(x, dtype)
                with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[grad]():
                    if grad == "grad" and how.input_gradient:
                        given.requires_grad_()
                    passed = given if how.leaf or 0 in given.stride() else given.clone()
                    stage = f"forward {step}"
                    with torch.autocast("cpu", torch.bfloat16, enabled=how.autocast and not exact):
                        y = checkpoint(model, passed, use_reentrant=False) if how.checkpointed else model(passed)
                    outputs.append(y.detach().clone(memory_format=torch.preserve_format))
                    inputs.append(passed.detach().clone())
                    stage = f"change {step}"
                    if how.changed:
                        getattr(y, how.changed)(*[2.0] * (how.changed != "relu_"))
                        inputs.append(passed.detach().clone())
                if grad == "grad" and y.requires_grad:
                    stage = f"backward {step}"
                    model.zero_grad()
                    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
                    loss = (y * upstream.to(y.dtype)).sum()
                    if how.penalty and given.requires_grad and not how.checkpointed:
                        (slope,) = torch.autograd.grad(loss, given, create_graph=True)
                        loss = slope.square().sum() + loss
                    loss.backward()
                    leaves = {n: p.grad for n, p in model.named_parameters()} | {"input": given.grad}
                    gradients |= {f"{n} {step}": g.detach().clone() for n, g in leaves.items() if g is not None}
        except Exception as raised:
            error, message = (stage, type(raised).__name__), str(raised)
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        keys, state = [*model.state_dict()], torch.get_rng_state()
        return Result(error, outputs, gradients, buffers, inputs, keys, state, log, message)


def _distance(a: torch.Tensor, truth: torch.Tensor, order: float, scale: float = 0.0) -> float:
    a, truth = a.double(), truth.double()
    same = (a == truth) | (a.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, a - truth)
    if not difference.numel():
        return 0.0
    if not difference.isfinite().all():
        return float("inf")
    size = max(float(torch.linalg.vector_norm(truth.nan_to_num(0, 0, 0), order)), scale)
    return float(torch.linalg.vector_norm(difference, order)) / (size or 1.0)


def _strides(x: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _values(result: Result) -> dict[str, tuple[torch.Tensor, float, float]]:
    """What is compared by value: tensor, order of the norm, least scale."""
    largest = max([float(g.double().norm().nan_to_num(0, 0, 0)) for g in result.gradients.values()], default=0.0)
    found = {f"output {k}": (y, float("inf"), 0.0) for k, y in enumerate(result.outputs)}
    found |= {f"input {k} afterwards": (y, float("inf"), 0.0) for k, y in enumerate(result.inputs)}
    found |= {f"buffer {n}": (b, float("inf"), 0.3) for n, b in result.buffers.items()}
    return found | {f"gradient of {n}": (g, 2.0, 1e-2 * largest) for n, g in result.gradients.items()}


def _drawn(seed: int) -> tuple[Model, Circumstances, torch.Tensor]:
    made = random_models.draw(seed)
    how = Circumstances.draw(random.Random(seed + 1))
    torch.manual_seed(seed)
    return made, how, _laid_out(made.shape, how.layout)


def differences(seed: int) -> list[str]:
    """What differs between a model and its fused copy; each a line."""
    made, how, x = _drawn(seed)
    with warnings.catch_warnings(), _choosing(how.implementation, seed):
        warnings.simplefilter("ignore")
        plain = _run(made.module, made, how, x, seed, False)
        with thresholds.ignored() if how.ignored else contextlib.nullcontext():
            fused = _run(made.module, made, how, x, seed, True)
            again = _run(made.module, made, how, x, seed, True) if made.drops else fused
        return [*_compared(made, how, x, seed, plain, fused), *_repeated(fused, again, how)]


def _repeated(fused: Result, again: Result, how: Circumstances) -> Iterator[str]:
    """Random numbers of ours are repeated by a seed."""
    for k, (a, b) in enumerate(zip(fused.outputs, again.outputs, strict=True)):
        if how.implementation != "measured" and not torch.equal(a.nan_to_num(), b.nan_to_num()):
            yield f"output {k}: another one with the same seed"


def _compared(
    made: Model, how: Circumstances, x: torch.Tensor, seed: int, plain: Result, fused: Result
) -> Iterator[str]:
    if plain.error != fused.error:
        # What fails in plain PyTorch as a result was changed may run, and fail in a later step that is not fused.
        (stage, kind), (later, other) = plain.error, fused.error
        after = ("change", "backward")
        allowed = not other or (other == kind and later.startswith(after) and later[-1] > stage[-1])
        if not (stage.startswith(after) and allowed):
            yield f"raises {fused.error} ({fused.message}); plain {plain.error} ({plain.message})"
        return
    if plain.keys != fused.keys:
        yield f"state dict: {fused.keys} for {plain.keys}"
    if plain.log != fused.log:
        yield f"hooks: {fused.log} for {plain.log}"
    if not made.drops and not torch.equal(plain.random_state, fused.random_state):
        yield "the state of the generator"
    if plain.error[1]:
        return
    ours, theirs = _values(fused), _values(plain)
    if missing := ours.keys() ^ theirs.keys():
        yield f"only one of the two has {sorted(missing)}"
        return
    for name, (a, *_) in ours.items():
        b = theirs[name][0]
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{name}: {tuple(a.shape)} {a.dtype} for {tuple(b.shape)} {b.dtype}"
            return
        if name.startswith("output") and _strides(a) != _strides(b):
            yield f"{name}: strides {a.stride()} for {b.stride()}"
    if made.drops and how.training:
        for k, (a, b) in enumerate(zip(fused.outputs, plain.outputs, strict=True)):
            if a.isfinite().all() != b.isfinite().all():
                yield f"output {k}: infinite or NaN"
        return
    yield from _by_value(made, how, x, seed, ours, theirs)


def _by_value(made: Model, how: Circumstances, x: torch.Tensor, seed: int, ours: Any, theirs: Any) -> Iterator[str]:
    if all(torch.equal(a, theirs[n][0]) for n, (a, *_) in ours.items()):
        return
    precision = torch.bfloat16 if how.autocast else how.dtype
    floor = FLOOR[precision] * (10 if made.draws else 1)  # without truth
    exact = dict(theirs) if made.draws else _values(_run(made.module, made, how, x.double(), seed, False))
    if exact.keys() != theirs.keys():
        exact = dict(theirs)
    suspects = {}
    # Of a model whose gradients are nothing but roundings (a norm of a constant) there is nothing to compare.
    noise = any(n.startswith("gradient") and _distance(b, exact[n][0], 2.0, s) > 1 for n, (b, _, s) in theirs.items())
    for name, (a, order, scale) in ours.items():
        if noise and name.startswith("gradient"):
            continue
        truth, own = exact[name][0], theirs[name][0]
        if _distance(own, truth, order, GARBAGE) > 1.0:
            return  # PyTorch itself is wrong: its ConvTranspose3d in bfloat16 is
        error, allowed = _distance(a, truth, order, scale), FACTOR * _distance(own, truth, order, scale) + floor
        if not error <= allowed and not _distance(a, own, order, scale) <= floor:
            suspects[name] = error, allowed
    if suspects:  # it may have PyTorch's wrong gradients, as the user's model has them
        bare = _values(_run(made.module, made, how, x, seed, False, corrected=False))
        suspects = {n: s for n, s in suspects.items() if not _distance(ours[n][0], bare[n][0], *ours[n][1:]) <= floor}
    for k, roundings in enumerate(_SHAKES if suspects else ()):  # is it the model that magnifies them?
        if roundings > _FEW and precision is torch.bfloat16:
            break
        size = (roundings + k / 16) * _ROUNDING[precision]
        # In its own precision too: what a model computes of roundings alone (the norm of one value) float64 gives as 0.
        for start in (x,) if made.draws else (x.double(), x) if roundings <= _FEW else (x.double(),):
            shaken = _values(_run(made.module, made, how, start, seed, False, size))
            for name, (error, allowed) in suspects.items():
                if name in shaken and (roundings <= _FEW or name.startswith("gradient")):
                    more = _distance(shaken[name][0], *exact[name][:1], *ours[name][1:])
                    factor = 2 * FACTOR if roundings <= _FEW else 1.0
                    suspects[name] = error, max(allowed, factor * more + floor)
    kinked = (made.kinks or how.changed == "relu_") and all(n.startswith("gradient") for n in suspects)
    for name, (error, allowed) in suspects.items():
        if not error <= (max(allowed, KINK) if kinked else allowed):
            yield f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _in_child(seeds: range, check: Callable[[int], list[str]]) -> Iterator[list[str]]:
    """What a check finds of each seed, in one process of its own; it ends early if that one dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(writing, "w") as pipe:
                for seed in seeds:
                    print(json.dumps(check(seed)), file=pipe, flush=True)
        finally:
            os._exit(0)  # it must not go on as a second parent
    os.close(writing)
    with os.fdopen(reading) as pipe:
        yield from map(json.loads, pipe)
    os.waitpid(child, 0)


def _plainly(seed: int) -> list[str]:
    """Runs the plain model alone."""
    made, how, x = _drawn(seed)
    _run(made.module, made, how, x, seed, False)
    return []


def compared(seeds: range) -> Iterator[tuple[int, list[str]]]:
    """The differences of each seed; none if PyTorch itself dies of it: some of its kernels write where they should not.

    In processes of their own, one until it dies.
    """
    while seeds:
        seed = seeds.start - 1
        for seed, found in enumerate(_in_child(seeds, differences), seeds.start):
            yield seed, found
        seeds = range(seed + 1, seeds.stop)
        if seeds:  # the next one ended the process
            dies = not [*_in_child(seeds[:1], _plainly)]
            yield seeds.start, [] if dies else ["the fused model ends the process, the plain one does not"]
            seeds = seeds[1:]


def report(seed: int, found: list[str]) -> str:
    """All that is to be known about a difference."""
    made, how = random_models.draw(seed), Circumstances.draw(random.Random(seed + 1))
    lines = [f"--only {seed}: {len(found)} differences", *(f"  {line}" for line in found[:8])]
    lines += [repr(made.module), made.source, *(a.label for a in made.actions), f"input {made.shape}; {how}", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_chains", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the chain of this number alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first = options.seed * SEEDS if options.only is None else options.only
    count, differing = options.count if options.only is None else 1, 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["GENAI_FAST_CACHE"] = cache
        for seed, found in compared(range(first, first + count)):
            if found:
                differing += 1
                print(report(seed, found), flush=True)
            elif options.only is not None:
                print(report(seed, []))
    print(f"{count} chains, {differing} differences, seed {options.seed}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
