"""What `fuse` does to a module: the class that it gets, and why it or a method of it stays as it is."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from genai_fast.fusion.chains import obstacle, replaced
from genai_fast.fusion.classes import original, replacement, subclass
from genai_fast.fusion.functions import SERVED
from genai_fast.fusion.latents import NAMES
from genai_fast.layers import GRU, LSTM, CrossEntropyLoss, FusedSequential, MultiheadAttention, RMSNorm

if TYPE_CHECKING:
    from genai_fast.fusion.rms_norms import RMS
    from genai_fast.fusion.written import Written

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule")
_OWN_CLASS = re.compile(r"super\(\s*(type\(\s*\w+\s*\)|\w+\.__class__)\s*,")

# What methods worth reading name, apart from their children: noise, and functions that an op serves.
_NAMED = NAMES | {function.__name__ for function in SERVED}

# Modules that become a layer of ours as they are.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.RMSNorm: RMSNorm,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.MultiheadAttention: MultiheadAttention,
}


def _is_sequential(cls: type) -> bool:
    return (
        issubclass(cls, nn.Sequential)
        and cls.forward in (nn.Sequential.forward, FusedSequential.forward)
        and cls.__iter__ is nn.Sequential.__iter__
    )


def _asks_for_its_class(cls: type) -> str:
    """Why a class cannot be changed: it calls super(self.__class__, self), which in a subclass never ends; else ""."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for name, member in vars(base).items():
            names = getattr(getattr(member, "__code__", None), "co_names", ())
            if "super" not in names or not {"__class__", "type"} & set(names):
                continue
            try:
                asks = _OWN_CLASS.search(inspect.getsource(member))
            except (OSError, TypeError):
                asks = True
            if asks:
                return f"{name}: it calls super with the object's own class, which fuse changes"
    return ""


def _is_written(cls: type) -> bool:
    """Whether this forward is user code: torch's modules are leaves or containers."""
    made_in = getattr(cls.forward, "__module__", None) or ""
    return not made_in.startswith(("torch.", "genai_fast."))


def _names_more(cls: type) -> bool:
    """Whether a method of user code, of a module without children, is worth reading."""
    methods = [f for base in cls.__mro__ if not base.__module__.startswith("torch.") for f in vars(base).values()]
    return any(not _NAMED.isdisjoint(getattr(getattr(f, "__code__", None), "co_names", ())) for f in methods)


class Plan(NamedTuple):
    """What fuse does to a module: a layer's forward, recompiled methods, or nothing; and why."""

    layer: type[nn.Module] | None = None
    methods: dict[str, Written] = {}  # noqa: RUF012
    reasons: tuple[str, ...] = ()  # why the module, or a method of it, is left as it is
    chains: tuple[tuple[tuple[str, ...], tuple[nn.Module, ...]], ...] = ()  # names and modules that follow each other
    rms: RMS | None = None  # the RMS norm that a class of the user's own computes


def plan_of(module: nn.Module, random: bool = True) -> Plan:
    cls = original(type(module))
    if wrapper := wrapper_of(module):
        return Plan(reasons=(f"{wrapper}: fuse before wrapping",))
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return Plan(reasons=("its forward is generated code",) if module._modules else ())
    if cls in LAYERS:
        reason = obstacle(module) if "forward" in module.__dict__ else replaced(cls)
        if not random and getattr(module, "dropout", 0):
            reason = "it draws random numbers"
        return Plan(reasons=(reason,)) if reason else Plan(LAYERS[cls])
    if not module._modules and _is_written(cls) and (plan := _plan_of_leaf(module, cls)):
        return plan
    written = _is_written(cls) and (module._modules or _names_more(cls))
    if not written and not _is_sequential(cls):
        return Plan()
    if reason := _asks_for_its_class(cls):
        return Plan(reasons=(reason,))
    if "forward" in module.__dict__:
        return Plan(reasons=("its forward is replaced" if _is_sequential(cls) else "forward: it is replaced",))
    if _is_sequential(cls):
        if reason := replaced(nn.Sequential):
            return Plan(reasons=(reason,))
        chains = ((tuple(module._modules), tuple(module._modules.values())),)
        return Plan(FusedSequential, chains=chains)
    return _plan_of_methods(module, cls, random)


def _plan_of_leaf(module: nn.Module, cls: type[nn.Module]) -> Plan | None:
    from genai_fast.fusion.rms_norms import rms_of, why_not  # not needed to import this package

    rms = rms_of(cls)
    if rms is None:
        return None
    reason = "its forward is replaced" if "forward" in module.__dict__ else why_not(rms, module)
    reason = reason or _asks_for_its_class(cls)
    return Plan(reasons=(reason,)) if reason else Plan(rms=rms)


def _plan_of_methods(module: nn.Module, cls: type[nn.Module], random: bool) -> Plan:
    from genai_fast.fusion.source import NothingFound, Refused
    from genai_fast.fusion.written import methods, written  # not needed to import this package

    found, refused = {}, {}
    for name, function in methods(module, cls, _NAMED):
        try:
            found[name] = written(module, function, random)
        except Refused as reason:
            refused[name] = reason
        except Exception as error:  # unforeseen construct: leave the method unchanged
            refused[name] = Refused(f"it cannot be read ({type(error).__name__}: {error})")
    reasons = tuple(
        f"{name}: {why}"
        for name, why in refused.items()
        if not (isinstance(why, NothingFound) and (found or name != "forward"))
    )
    chains = ((tuple(map(str, c.steps)), c.modules) for method in found.values() for c in method.chains)
    return Plan(None, found, reasons, tuple(dict.fromkeys(chains)))  # the branches of a method may have one each


def fused_class(module: nn.Module, random: bool) -> type[nn.Module] | None:
    """The class that a module gets; None if it keeps its own."""
    cls = type(module)
    if original(cls) is not cls or issubclass(cls, FusedSequential):
        return None
    plan = plan_of(module, random)
    base = {nn.Sequential: FusedSequential, **LAYERS}.get(cls, cls)
    if plan.layer is not None:
        return subclass(cls, base, (random,), lambda: _members(cls, plan.layer) | {"_random": random})
    if plan.rms is not None:
        from genai_fast.fusion.rms_norms import members

        key = (cls.forward, cls.forward.__code__, plan.rms.weight, plan.rms.eps)
        return subclass(cls, cls, key, lambda: members(cls, plan.rms))
    if not plan.methods:
        return None
    key = tuple((name, *method.key) for name, method in plan.methods.items())
    members = lambda: {n: method.compile(replacement(cls, n)) for n, method in plan.methods.items()}  # noqa: E731
    return subclass(cls, base, key, members)


def _members(cls: type[nn.Module], layer: type[nn.Module]) -> dict[str, Any]:
    """Of a class that runs as one of ours: our forward, which is left to what replaces the class's own later."""
    return {"forward": layer.forward, "_replacement": staticmethod(replacement(cls, "forward"))}


def wrapper_of(module: nn.Module) -> str:
    for cls in type(module).__mro__:
        if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
            return cls.__name__
    return "a compiled module" if module._compiled_call_impl is not None else ""
