"""The classes of fused modules: subclasses that copies keep, and that a pickle takes for the original ones."""

import abc
import copy
import copyreg
from collections.abc import Callable
from typing import Any

from torch import nn

from genai_fast.fusion.chains import replaced


class _Fused(type):
    """The metaclass of fused classes: a fused class is pickled as the one that it was made from, and has its instances,
    as methods ask for `isinstance(child, type(self))`.

    It does not compare equal to it: caches by class, as fully_shard's, would take one for the other.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or original(cls) in type(instance).__mro__

    def __subclasscheck__(cls, other: type) -> bool:
        return super().__subclasscheck__(other) or original(cls) in getattr(other, "__mro__", ())


class _InPlace:
    """Mixin of fused classes: the original class with another forward, and pickled as the original class."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Bypass the base class's hook: it may register its subclasses, or refuse to be subclassed."""

    def __reduce_ex__(self, protocol: int) -> Any:
        # Later protocols name the class of the object, and pickle insists on that.
        reduced = super().__reduce_ex__(min(protocol, 1))
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        arguments = tuple(original(a) if isinstance(a, type) else a for a in arguments)
        return function, arguments, *rest

    def __copy__(self) -> Any:
        inherited = getattr(super(), "__copy__", None)
        return copy._reconstruct(self, None, *super().__reduce_ex__(4)) if inherited is None else inherited()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            return inherited(memo)
        if nn.utils.parametrize.is_parametrized(self):  # such a class refuses to be reduced
            twin = self.__new__(type(self))
            memo[id(self)] = twin
            twin.__dict__ = copy.deepcopy(self.__dict__, memo)
            return twin
        # What deepcopy does without this method, but not by way of the pickle, which is of the original class.
        return copy._reconstruct(self, memo, *super().__reduce_ex__(4))

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script, which compiles the original class."""
        plain = object.__new__(original(type(self)))
        plain.__dict__ = {**self.__dict__, "_modules": {**self._modules}}
        return plain


def replacement(cls: type[nn.Module], name: str) -> Callable[[], Any]:
    """A function that returns what a method of cls has been replaced by since this call; None if it is the same."""
    seen = getattr(cls, name)

    def now() -> Any:
        return None if getattr(cls, name) is seen and not replaced(cls) else getattr(cls, name)

    now._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as assume_constant_result does it
    return now


def replaced_forward(module: nn.Module) -> Any:
    """What the class of a fused layer has got in place of the forward that fuse saw; None if there is nothing."""
    now = getattr(type(module), "_replacement", None)
    return None if now is None else now()


_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_kinds: dict[type, type] = {}


def original(cls: type) -> type:
    """The class before fuse; cls itself if fuse did not create it."""
    return vars(cls).get("_fused_from", cls)


def subclass(
    cls: type[nn.Module], base: type[nn.Module], key: tuple[Any, ...], members: Callable[[], dict[str, Any]]
) -> type[nn.Module]:
    """The class that replaces cls: a subclass of base with these members, made once for each key."""
    key = (cls, *key)
    if key not in _classes:
        names = {k: v for k, v in vars(cls).items() if k == "__annotations__"}
        names |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        kind = _kind(type(base))
        # Not by calling it: a metaclass may register its classes, or refuse the same name twice.
        make: Any = abc.ABCMeta.__new__ if issubclass(kind, abc.ABCMeta) else type.__new__
        _classes[key] = make(kind, cls.__name__, (_InPlace, base), {**names, "_fused_from": cls, **members()})
    return _classes[key]


def _kind(metaclass: type) -> type:
    """The metaclass of a fused class whose base has this one."""
    if metaclass not in _kinds:
        bases = (_Fused,) if metaclass is type else (_Fused, metaclass)
        _kinds[metaclass] = kind = type("_Fused", bases, {})
        copyreg.pickle(kind, lambda cls: (copy.copy, (original(cls),)))
    return _kinds[metaclass]
