"""What is replaced, counted or looked up by class around a fused model does what it does around a plain one."""

import abc
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close, calls_of, plain_of
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from genai_fast import explain, fuse, unfuse
from genai_fast.fusion import chains
from genai_fast.models import VRNN, LSTMLanguageModel

pytestmark = pytest.mark.usefixtures("small_is_fused")


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.Tanh()
    )


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act, self.drop = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0)

    def forward(self, x, scale=1.0, *, shift=0.0):
        x = self.act(self.bn(self.conv(x)))
        x = F.silu(self.bn(x)) * scale
        return self.tail(self.drop(torch.tanh(self.bn(x).relu()))) + shift

    def tail(self, x):
        return torch.relu(self.bn(x)) + 1.0


class Yields(Written):
    def forward(self, x):
        yield F.relu(self.bn(self.conv(x)))


def x():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_same(make, *inputs):
    fused, plain = fuse(make()), make()
    for training in (True, False):
        assert_close(fused.train(training)(*inputs), plain.train(training)(*inputs), 1e-4)


# --- methods and functions that somebody replaces, before fuse and after


def twice(own):
    return lambda *args, **named: own(*args, **named) * 2


FUNCTIONS = [
    (F, "batch_norm"), (F, "conv2d"), (F, "relu"), (F, "conv_transpose2d"), (F, "dropout"), (F, "silu"),
    (torch, "batch_norm"), (torch, "tanh"), (torch, "relu"),
]  # fmt: skip
METHODS = [
    *((cls, "forward") for cls in (nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.Dropout, nn.Tanh, nn.ConvTranspose2d)),
    (nn.modules.batchnorm._BatchNorm, "forward"), (nn.Sequential, "forward"), (nn.Conv2d, "_conv_forward"),
    (nn.Module, "__call__"), (nn.Module, "_call_impl"), (Written, "forward"), (Written, "tail"),
]  # fmt: skip


@pytest.mark.parametrize("make", [chain, Written])
@pytest.mark.parametrize(("owner", "name"), FUNCTIONS + METHODS, ids=lambda v: getattr(v, "__name__", v))
def test_a_method_or_function_replaced_later(make, owner, name, monkeypatch):
    fused, plain = fuse(make()), make()
    monkeypatch.setattr(owner, name, twice(getattr(owner, name)))
    assert_close(fused(x()), plain(x()), 1e-4)
    monkeypatch.undo()
    assert_close(fused.eval()(x()), plain.eval()(x()), 1e-4)


@pytest.mark.parametrize(
    ("make", "given"),
    [(chain, x()), (lambda: nn.GRU(4, 4), torch.randn(12, 2, 4)), (lambda: nn.RMSNorm(64), torch.randn(9, 64))],
    ids=["Sequential", "GRU", "RMSNorm"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_forward_of_a_layer_is_replaced(make, given, when, monkeypatch):
    plain = make()
    cls, fused = type(plain), copy.deepcopy(plain)
    if when == "after":
        fuse(fused)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args: ("replaced", own(self, *args)))
    fuse(fused)
    assert (type(fused) is cls) is (when == "before")
    found, expected = fused(given), plain(given)
    assert found[0] == expected[0] == "replaced"
    assert_close(*(y[1][0] if isinstance(y[1], tuple) else y[1] for y in (found, expected)), 1e-4)
    assert when == "after" or f"{cls.__name__}.forward is replaced" in next(iter(explain(fused))).reason


def test_a_replacement_is_called_as_the_method_was(monkeypatch):
    fused, seen = fuse(Written()), []
    monkeypatch.setattr(Written, "forward", lambda self, *args, **named: seen.append((args, named)))
    fused(1)
    fused(1, 2)
    fused(1, scale=3, shift=4)
    assert seen == [((1,), {}), ((1, 2), {}), ((1, 3), {"shift": 4})]


def test_a_generator_that_is_replaced(monkeypatch):
    fused = fuse(Yields())
    assert type(fused) is not Yields.__mro__[0]
    assert len([*fused(x())]) == 1
    monkeypatch.setattr(Yields, "forward", lambda self, x: iter("abc"))
    assert [*fused(x())] == ["a", "b", "c"]


# --- modes see torch's own operators


class Counting(TorchFunctionMode):
    def __init__(self):
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [chain, Written])
def test_a_mode_sees_what_it_sees_of_a_plain_model(make):
    names, flops = [], []
    for model in (fuse(make()), make()):
        with Counting() as mode:
            model(x())
        names.append(mode.names)
        with FlopCounterMode(display=False) as counter:
            model(x()).sum().backward()
        flops.append(counter.get_total_flops())
    assert names[0] == names[1] and F.batch_norm in names[0]
    assert flops[0] == flops[1] > 0


def test_a_default_device_is_no_such_mode(fused_calls):
    model, given = fuse(chain()), x()
    with torch.device("meta"):
        y = model(given)
    assert y.is_cpu and fused_calls == ["relu"]


# --- classes


def test_a_fused_class_has_the_instances_of_its_original():
    model, other = fuse(chain()), nn.Sequential()
    cls = type(model)
    assert isinstance(other, cls) and not isinstance(nn.Linear(1, 1), cls)
    assert issubclass(nn.Sequential, cls) and not issubclass(nn.Module, cls)
    assert len({cls: 1, nn.Sequential: 2}) == 2  # caches by class keep them apart
    named = functools.singledispatch(lambda m: "other")
    named.register(nn.GRU, lambda m: "gru")
    assert named(fuse(nn.GRU(2, 2))) == "gru"


class Tree(nn.Module):
    """Asks whether its child is of its own class, and two of them are not fused alike."""

    def __init__(self, depth):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU() if depth else nn.CELU()
        self.child = Tree(depth - 1) if depth else nn.Identity()

    def forward(self, x):
        x = self.act(self.bn(x))
        return self.child(x) * 2 if isinstance(self.child, type(self)) else x


def test_classes_that_are_fused_otherwise_are_of_one_class():
    assert_same(lambda: Tree(2), x())


def test_a_shallow_copy_stays_fused():
    model = fuse(chain())
    twin = copy.copy(model)
    assert type(twin) is type(model) and twin[0] is model[0]
    assert_close(twin(x()), plain_of(model)(x()), 1e-4)


class Registry(type):
    classes: dict = {}  # noqa: RUF012

    def __new__(mcs, name, bases, members):
        if name in mcs.classes:
            raise RuntimeError(f"{name} is registered twice")
        return super().__new__(mcs, name, bases, members)

    def __init__(cls, name, bases, members):
        super().__init__(name, bases, members)
        cls.classes[name] = cls
        assert "purpose" in members


class Registered(Written, metaclass=Registry):
    purpose = "a metaclass that counts its classes"


class Abstract(Written, abc.ABC):
    @abc.abstractmethod
    def name(self): ...


class Concrete(Abstract):
    def name(self):
        return "concrete"


class Slots(Written):
    __slots__ = ("place",)


@pytest.mark.parametrize("cls", [Registered, Concrete, Slots])
def test_classes_of_another_metaclass(cls):
    assert_same(cls, x())
    model = fuse(cls())
    assert type(model) is not cls and type(unfuse(model)) is cls
    assert Registry.classes == {"Registered": Registered}
    assert isinstance(fuse(cls()), cls) and not isinstance(Written(), type(fuse(cls())))


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(2, 3),
        nn.GRU(2, 3),
        nn.GRUCell(2, 3),
        nn.LSTM(2, 3, bias=False),
        nn.MultiheadAttention(4, 2),
        nn.Linear(2, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_as_it_was_made_is_untouched(module):
    """Recurrent layers have a setting of the name `bias`."""
    assert chains.untouched(module, type(module))
    module.forward = module.forward
    assert not chains.untouched(module, type(module))


def test_the_short_ways_of_recurrent_models_are_taken():
    """Their own ways, which ask whether modules are as they were made."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(20, 8, 8, 2)
    with calls_of("lstm") as made:
        model.training_step(*torch.randint(20, (2, 3, 5)), torch.ones(3))
    assert len(made) == 2
    assert VRNN(20, embedding=8, hidden=8, latent=4)._is_as_made()
