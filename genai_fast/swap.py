"""fuse(model): the containers and methods of a model run batch norm, activation and dropout as fused calls.

GRU and RMS norm become the layers that compute them in one call; PyTorch's layer norm, without a residual, is one.

The model stays the object that it is, with its children, keys and hooks; only the class of some modules changes, to a
subclass of what it was. Whether a run is fused is decided at each call, by `genai_fast.layers`.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast.fusion.chains import STOCK, letter, obstacle, runs
from genai_fast.fusion.implementations import convolution
from genai_fast.layers import GRU, FusedSequential, RMSNorm

__all__ = ["Explanation", "Row", "explain", "fuse", "unfuse"]

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule")


_OWN_CLASS = re.compile(r"super\(\s*(type\(\s*\w+\s*\)|\w+\.__class__)\s*,")

# Modules that become a layer of ours as they are.
_LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.GRU: GRU, nn.RMSNorm: RMSNorm}


class _InPlace:
    """What a module's class becomes: its own class, with another forward. Pickled, it is its own class again."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """The base class is not told: it may keep a register of its subclasses, or refuse to have any."""

    def __reduce_ex__(self, protocol: int) -> Any:
        # Later protocols name the class of the object, and pickle insists on that.
        reduced = super().__reduce_ex__(min(protocol, 1))
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        arguments = tuple(_original(a) if isinstance(a, type) else a for a in arguments)
        return function, arguments, *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            return inherited(memo)
        # What deepcopy does without this method, but not by way of the pickle, which is of the original class.
        return copy._reconstruct(self, memo, *super().__reduce_ex__(4))


_classes: dict[tuple[Any, ...], type[nn.Module]] = {}


def _original(cls: type) -> type:
    """The class that fuse found; cls itself if fuse did not make it."""
    return vars(cls).get("_fused_from", cls)


def _subclass(cls: type[nn.Module], key: tuple[Any, ...], **members: Any) -> type[nn.Module]:
    key = (cls, *key)
    if key not in _classes:
        base = {nn.Sequential: FusedSequential, **_LAYERS}.get(cls, cls)
        names = {k: v for k, v in vars(cls).items() if k == "__annotations__"}
        names |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _classes[key] = type(cls.__name__, (_InPlace, base), {**names, "_fused_from": cls, **members})
    return _classes[key]


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


def _plans(module: nn.Module, cls: type[nn.Module]) -> tuple[dict[str, Any], dict[str, str]]:
    """For a module whose class somebody wrote: its methods that are made again, and why others are not."""
    from genai_fast.fusion.rewrite import methods, written  # neither is needed to import this package
    from genai_fast.fusion.source import NothingFound, Refused

    if "forward" in module.__dict__:
        return {}, {"forward": "it is replaced"}
    plans, refused = {}, {}
    for name, function in methods(module, cls):
        try:
            plans[name] = written(module, function)
        except Refused as reason:
            refused[name] = reason
        except Exception as error:  # of a class that does what nobody thought of: it stays as it is
            refused[name] = Refused(f"it cannot be read ({type(error).__name__}: {error})")
    silent = {name for name, why in refused.items() if isinstance(why, NothingFound) and (plans or name != "forward")}
    return plans, {name: str(why) for name, why in refused.items() if name not in silent}


def _is_generated(module: nn.Module) -> bool:
    return isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))


def _is_written(module: nn.Module, cls: type) -> bool:
    """Whether somebody wrote this forward that calls children: torch's own modules are leaves or containers."""
    made_in = getattr(cls.forward, "__module__", None) or ""
    return bool(module._modules) and not made_in.startswith(("torch.", "genai_fast."))


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    cls = type(module)
    if _original(cls) is not cls or "forward" in module.__dict__ or _is_generated(module):
        return None
    if cls in _LAYERS:
        return _subclass(cls, (), forward=_LAYERS[cls].forward)
    if _asks_for_its_class(cls):
        return None
    if _is_sequential(cls):
        if issubclass(cls, FusedSequential):
            return None
        return _subclass(cls, (), forward=FusedSequential.forward)
    if not _is_written(module, cls):
        return None
    plans, _ = _plans(module, cls)
    if not plans:
        return None
    key = tuple((name, *plan.key) for name, plan in plans.items())
    if (cls, *key) in _classes:
        return _classes[(cls, *key)]
    return _subclass(cls, key, **{name: plan.compile() for name, plan in plans.items()})


def _wrapper(module: nn.Module) -> str:
    for cls in type(module).__mro__:
        if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
            return cls.__name__
    return "a compiled module" if module._compiled_call_impl is not None else ""


def _check(name: str, model: Any, wrapped: bool = False) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model: expected an nn.Module, got {type(model).__name__}; pass the model itself")
    for path, module in () if wrapped else model.named_modules():
        if wrapper := _wrapper(module):
            raise TypeError(
                f"{name}: {path or 'model'}: expected a module that nothing wraps yet, got {wrapper};"
                f" {name} the model first, then wrap or compile it"
            )


def fuse(model: nn.Module) -> nn.Module:
    """Make a model run norms, activations, dropout and GRUs as fused calls, in place.

    nn.GRU and nn.RMSNorm become those of `layers`; nn.Sequential at any depth becomes a `layers.FusedSequential`; a
    class whose methods call norms and activations in a row gets a subclass with these methods compiled again.
    Parameters, buffers, keys, hooks, copies and optimizers stay; a pickle holds the original classes. `explain` says
    what happens to each module and why not.

    Args:
        model: any module, before DistributedDataParallel, fully_shard or torch.compile.

    Returns:
        The same object. A fused model stays as it is.

    Raises: TypeError on a model that is wrapped already, or holds a module that is, and on what is no module.
    """
    _check("fuse", model)
    for module, cls in [(module, _fused_class(module)) for module in model.modules()]:
        if cls is not None:
            object.__setattr__(module, "__class__", cls)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module that `fuse` changed its own class back, in place; the same object is returned.

    Raises: TypeError as `fuse` does.
    """
    _check("unfuse", model)
    for module in model.modules():
        if _original(type(module)) is not type(module):
            object.__setattr__(module, "__class__", _original(type(module)))
    return model


class Row(NamedTuple):
    """Modules at a path, what they are, what they become, or ("" then) why they are left alone."""

    path: str
    found: str
    becomes: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `fuse` does to a model: rows to iterate over, and a table as str."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [("module", "found", "becomes")]
        lines += [(row.path or ".", row.found, row.becomes or f"left alone: {row.reason}") for row in self.rows]
        widths = [max(len(line[k]) for line in lines) for k in (0, 1)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in lines)


def explain(model: nn.Module) -> Explanation:
    """What `fuse` makes of each part of a model, and why it leaves the others alone; the model is not changed.

    Raises: TypeError on what is no module.
    """
    _check("explain", model, wrapped=True)
    return Explanation(tuple(row for path, module in model.named_modules() for row in _rows(path, module)))


def _rows(path: str, module: nn.Module) -> Iterator[Row]:
    cls, found = _original(type(module)), type(module).__name__
    if wrapper := _wrapper(module):
        yield Row(path, found, "", f"{wrapper}: fuse comes first")
    elif _is_generated(module):
        if any(True for _ in module.children()):
            yield Row(path, found, "", "its forward is generated already")
    elif cls in _LAYERS:
        replaced = "forward" in module.__dict__
        yield Row(path, found, "" if replaced else f"layers.{found}", obstacle(module) if replaced else "")
    elif (_is_sequential(cls) or _is_written(module, cls)) and (reason := _asks_for_its_class(cls)):
        yield Row(path, found, "", reason)
    elif _is_sequential(cls):
        if "forward" in module.__dict__:
            yield Row(path, found, "", obstacle(module))
        else:
            yield from _chain_rows(path, list(module._modules), list(module._modules.values()))
    elif _is_written(module, cls):
        plans, reasons = _plans(module, cls)
        for method, reason in reasons.items():
            yield Row(path, found, "", f"{method}: {reason}")
        for plan in plans.values():
            for chain in plan.chains:
                names = list(map(str, chain.steps))
                yield from _chain_rows(path, names, list(chain.modules))


def _chain_rows(path: str, names: list[str], modules: list[nn.Module]) -> Iterator[Row]:
    for run in runs("".join(letter(m) for m in modules)):
        here = modules[run.start : run.stop]
        where = ".".join(part for part in (path, "+".join(names[run.start : run.stop])) if part)
        found = " + ".join(type(m).__name__ for m in here)
        if run.fused:
            last = f" ({type(here[-1]).__name__})" if run.letters[-1] in "Aa" else ""
            if run.letters[-1] in "Dd":
                becomes = "act_dropout in training"
            else:
                becomes = f"batch_norm_act{last}" if "N" in run.letters else ""
            yield Row(where, found, "; ".join(filter(None, (becomes, convolution(here[0])))), "")
        elif run.letters == "." and (reason := _why_not(here[0])):
            yield Row(where, found, "", reason)
        elif (run.letters[0] in "ad" and len(run.letters) > 1) or run.letters == "d":
            yield Row(where, found, "", "it works in place on what this container was given")


def _why_not(module: nn.Module) -> str:
    """Why a module that looks like one of torch's does not count as one; "" if it does not look like one."""
    if not isinstance(module, (*STOCK, nn.modules.batchnorm._NormBase)):
        return ""
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is made at its first call"
    if type(module) in STOCK:
        return obstacle(module)
    return f"a subclass of {', '.join(base.__name__ for base in type(module).__bases__)}"
