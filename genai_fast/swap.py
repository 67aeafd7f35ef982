"""fuse(model): containers and methods run convolution, batch norm, activation and dropout as fused calls.

GRU, LSTM, multi-head attention and RMS norm become layers of ours; PyTorch's layer norm is one call already.

The model remains the same object, with its children, keys and hooks; only the class of some modules changes, to a
subclass of the original. `genai_fast.fusion` decides at each call whether a chain is fused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from genai_fast.autotune import Choice
from genai_fast.fusion import implementations
from genai_fast.fusion.chains import CONVS, STOCK, TRANSPOSED, letter, obstacle, spans
from genai_fast.fusion.classes import original
from genai_fast.fusion.explanation import Explanation, Row
from genai_fast.fusion.implementations import Decision
from genai_fast.fusion.operands import Convolution
from genai_fast.ops import attention_peers, checks
from genai_fast.planning import LAYERS, fused_class, plan_of, wrapper_of

__all__ = ["Explanation", "Row", "explain", "fuse", "unfuse"]


def _check(name: str, model: Any, wrapped: bool = False) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model: expected an nn.Module, got {type(model).__name__}; pass the model itself")
    for path, module in () if wrapped else model.named_modules():
        if wrapper := wrapper_of(module):
            raise TypeError(
                f"{name}: {path or 'model'}: expected a module that is not wrapped yet, got {wrapper};"
                f" {name} the model first, then wrap or compile it"
            )


def fuse(model: nn.Module, *, random: bool = True) -> nn.Module:
    """Run a model's norms, activations, gates, attention, dropout, latents, losses and GRUs as fused calls, in place.

    nn.GRU, nn.LSTM, nn.RMSNorm and nn.MultiheadAttention become their counterparts in `layers`; nn.Sequential at any
    depth becomes a `layers.FusedSequential`; a class whose methods call norms and activations in sequence gets a
    subclass with these methods recompiled, and so does one that samples `mu + exp(logvar / 2) * noise`, attends by
    `softmax(q k^T) v`, takes no weights of an nn.MultiheadAttention, calls F.cross_entropy, multiplies SiLU or GELU of
    a gate by another tensor, turns queries and keys by `x * cos + rotate_half(x) * sin`, or is an RMS norm, whatever
    these are called, as in transformers' models.
    Upsampling to twice the size (nearest neighbour) and a 3 x 3 convolution after it become one where that is faster.
    Under torch.compile such calls are left to the compiler. Parameters, buffers, keys, hooks, copies and optimizers do
    not change; a pickle holds the original classes. `explain` reports what happens to each module and why.

    Tools that look up a module's very class in a table pass a fused one by without a word, such as
    torch.ao.quantization.quantize_dynamic(model, {nn.GRU}): quantize first and then fuse, or `unfuse` before.
    Under a dispatch or function mode modules run as they are, and so does one whose methods or functions were replaced.

    Args:
        model: any module, before DistributedDataParallel, fully_shard or torch.compile.
        random: whether dropout and the sampling of latents may draw other random numbers than PyTorch's own, of the
            same distribution; torch.manual_seed reproduces them.

    Returns: The same object. Fusing a fused model changes nothing.
    Raises TypeError: the model is not a module, or is wrapped or compiled already, or contains such a module.
    """
    _check("fuse", model)
    random = checks.flag("fuse", "random", random)
    for module, cls in [(module, fused_class(module, random)) for module in model.modules()]:
        if cls is not None:
            object.__setattr__(module, "__class__", cls)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse` in place: every module gets its original class back. Returns the same object.

    Raises TypeError: as for `fuse`.
    """
    _check("unfuse", model)
    for module in model.modules():
        if original(type(module)) is not type(module):
            object.__setattr__(module, "__class__", original(type(module)))
    return model


def explain(model: nn.Module, example_input: Any = None) -> Explanation:
    """Report what `fuse` does to each part of a model and why it leaves the rest alone; the model is not changed.

    Args:
        model: any module, fused or not.
        example_input: a tensor, or a tuple of positional arguments. With it the model runs once, temporarily fused, in
            its current mode and contexts (no_grad, autocast), and there is a row for each chain that ran and for each
            other leaf: what served it, with the measured times in microseconds, and why the other implementations did
            not (size below a threshold, dtype, layout, device, measured slower). Buffers and random state are restored.

    Returns: An `Explanation`: rows (path, found, becomes, reason), and a table when printed.
    Raises TypeError: the model is not a module. With an example, whatever the model raises.
    """
    _check("explain", model, wrapped=True)
    if example_input is not None:
        return Explanation(tuple(_observed_rows(model, example_input)))
    covered: set[int] = set()
    rows = [row for path, module in model.named_modules() for row in _rows(path, module, covered)]
    return Explanation(tuple(rows))


def _rows(path: str, module: nn.Module, covered: set[int]) -> Iterator[Row]:
    plan, found = plan_of(module), type(module).__name__
    for reason in plan.reasons:
        yield Row(path, found, "", reason)
    if plan.rms is not None:
        yield Row(path, found, "rms_norm", "")
    if plan.layer in LAYERS.values():
        yield Row(path, found, f"layers.{found}", "")
    for method in plan.methods.values():
        yield from (Row(path, found, becomes, "") for found, becomes in method.notes)
    for names, modules in plan.chains:
        yield from _chain_rows(path, names, modules, covered)
    left = not module._modules and id(module) not in covered and not plan.reasons and plan.layer is plan.rms is None
    if left and (reason := _why_left(module)):
        yield Row(path, found, "", reason)


def _chain_rows(path: str, names: Sequence[str], modules: Sequence[nn.Module], covered: set[int]) -> Iterator[Row]:
    for span in spans("".join(letter(m) for m in modules)):
        here = modules[span.start : span.stop]
        where = ".".join(part for part in (path, "+".join(names[span.start : span.stop])) if part)
        found = " + ".join(type(m).__name__ for m in here)
        if span.fused:
            covered.update(map(id, here))
            yield Row(where, found, _becomes(span.letters, here), "")
        elif span.letters == "." and (reason := _why_not(here[0])):
            covered.add(id(here[0]))
            yield Row(where, found, "", reason)
        elif (span.letters[0] in "ad" and len(span.letters) > 1) or span.letters == "d":
            covered.update(map(id, here))
            yield Row(where, found, "", "it works in place on the container's input")


def _becomes(letters: str, modules: Sequence[nn.Module]) -> str:
    """The fused call of a chain, and for a convolution the implementations among which measurement chooses."""
    if letters[-1] in "Dd":
        return "act_dropout in training"
    if letters == "P":
        return "bias_act (PReLU)"
    parts = []
    inside = [
        "residual" if k == "R" else type(m).__name__ for k, m in zip(letters, modules, strict=True) if k in "AaPR"
    ]
    said = f" ({', '.join(inside)})" if inside else ""
    if "N" in letters:
        parts.append(f"batch_norm_act{said}")
    if letters[0] == "G":
        parts.append(f"group_norm_act{said}")
    if letters[0] == "U":
        parts.append("upsample_conv2d, or one after the other, whichever is faster")
        letters, modules = letters[1:], modules[1:]
    if type(modules[0]) in (nn.Conv2d, nn.ConvTranspose2d):
        conv = Convolution.of(modules[0])
        names = [option.name for option in implementations.CONVOLUTIONS]
        if "R" in letters:  # the norm waits for the residual
            names = [name for name in names if "folded" not in name]
        reason = implementations.kernel_why_not(conv)
        if reason:
            names.remove("kernel")
        parts.append(f"convolution by the fastest of {', '.join(names)}" + (f" (kernel: {reason})" if reason else ""))
    elif type(modules[0]) in CONVS + TRANSPOSED:
        parts.append("convolution by torch")
    return "; ".join(parts)


def _why_not(module: nn.Module) -> str:
    """Why a module that resembles one of torch's is not treated as one; "" if it resembles none."""
    if not isinstance(module, (*STOCK, nn.modules.batchnorm._BatchNorm)):
        return ""
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is initialized on its first call"
    if type(module) in STOCK:
        return obstacle(module)
    return f"a subclass of {', '.join(base.__name__ for base in type(module).__bases__)}"


# Expensive leaves that fuse leaves to PyTorch: what helps.
_REMEDIES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNN,), "PyTorch's recurrence is one call already; genai_fast.tune_cpu() speeds up its matmuls"),
    ((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "PyTorch draws a number for each channel and multiplies in one pass"),
    ((nn.AlphaDropout, nn.FeatureAlphaDropout), "PyTorch's, with its random numbers"),
    (
        (nn.BCELoss,),
        "PyTorch's: where a sigmoid before it saturates, the loss is cut at 100 and has no gradient;"
        " nn.BCEWithLogitsLoss of the logits is exact, as ops.vae_loss is",
    ),
    ((nn.PReLU,), "it is fused where an nn.Sequential or a method of its own module calls it"),
    ((nn.Upsample,), "it is fused with a 3 x 3 convolution after it, at twice the size by nearest neighbour"),
    ((nn.LayerNorm,), "PyTorch's is one call already; layers.LayerNorm adds a residual to it"),
    ((nn.Linear, nn.Bilinear), "PyTorch's matmul; genai_fast.tune_cpu() speeds it up if oneDNN is faster"),
)


def _why_left(module: nn.Module) -> str:
    """Why PyTorch serves a leaf; "" for a leaf that costs next to nothing."""
    if reason := _why_not(module):
        return reason
    for kinds, remedy in _REMEDIES:
        if isinstance(module, kinds):
            return remedy
    costly = any(True for _ in module.parameters(recurse=False)) or isinstance(module, _WITHOUT_PARAMETERS)
    return f"there is no fused {type(module).__name__}" if costly and not isinstance(module, STOCK) else ""


_WITHOUT_PARAMETERS = (
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.CELU, nn.Softmax, nn.LogSoftmax,
    nn.GLU, nn.PixelShuffle, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
)  # fmt: skip


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves the model's buffers and the random state as they are."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _observed_rows(model: nn.Module, example_input: Any) -> Iterator[Row]:
    """Run the model once; report what served each chain and leaf."""
    paths = {id(module): path for path, module in model.named_modules()}
    decisions: list[tuple[Sequence[nn.Module], Decision]] = []
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    was_fused = any(original(type(m)) is not type(m) for m in model.modules())
    attention: dict[str, Choice] = {}
    token = implementations.listener.set(lambda modules, decision: decisions.append((tuple(modules), decision)))
    try:
        with undisturbed(model), attention_peers.heard(attention.__setitem__):
            if not was_fused and not wrapper_of(model):
                fuse(model)
            model(*arguments)
    finally:
        implementations.listener.reset(token)
        if not was_fused and not wrapper_of(model):
            unfuse(model)
    covered: set[int] = set()
    for modules, decision in decisions:
        names = [paths.get(id(m), f"{type(m).__name__}()") for m in modules]
        covered.update(map(id, modules))
        found = " + ".join(type(m).__name__ for m in modules)
        yield Row("+".join(names), found, _served(decision), _unserved(decision))
    for found, (name, times) in attention.items():
        decision = Decision(name, dict.fromkeys(times.keys() - {name}, "measured slower"), times)
        yield Row("", found, _served(decision), _unserved(decision))
    for path, module in model.named_modules():
        if id(module) not in covered:
            for row in _rows(path, module, covered):
                if not row.becomes.startswith(_OBSERVED):
                    yield row


# What a chain becomes: its calls have rows of their own.
_OBSERVED = ("batch_norm_act", "group_norm_act", "bias_act", "convolution", "act_dropout", "upsample_conv2d")


def _served(decision: Decision) -> str:
    time = decision.microseconds.get(decision.name)
    return decision.name if time is None else f"{decision.name} ({time:.0f} us)"


def _unserved(decision: Decision) -> str:
    times = decision.microseconds
    said = (f"{n}: {why}" + (f" ({times[n]:.0f} us)" if n in times else "") for n, why in decision.reasons.items())
    return "; ".join(said)
