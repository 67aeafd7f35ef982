"""Methods that somebody wrote: what fuse joins in them, and that it joins nothing that anything else can see."""

import contextlib
import importlib.util
import inspect
import logging
import random
import traceback

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_close
from torch import nn
from torch.nn.functional import leaky_relu as leaky

from genai_fast import explain, fuse, unfuse, use_backend

pytestmark = pytest.mark.usefixtures("small_is_fused")

FACTOR = 2.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.downsample, self.scale, self.__secret = None, 2.0, nn.Tanh()
        self.gain = nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])


# What each calls as one, in order: activations of its batch norms.
FUSED = {}


def fused_as(*activations):
    def enter(cls):
        FUSED[cls] = [*activations]
        return cls

    return enter


@fused_as("relu", "relu")
class _BasicBlock(_Base):
    """torchvision's."""

    def forward(self, x):
        identity = x

        out = self.conv(x)
        out = self.bn(out)
        out = self.act(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.act(out)


@fused_as("relu")
class _Flags(_Base):
    def forward(self, x, *, flip: bool = False, times=FACTOR):
        """Reads flags, globals and parameters.

        Indented, and over several lines.
        """
        if flip:
            x = -x
        y = F.relu(self.bn(self.conv(x))) * self.gain + self.conv.bias.sum()
        y = F.dropout(y, 0.5, False) if self.scale > 1 else y
        return y * FACTOR / len(x) * (y > 0) * times


@fused_as("leaky_relu", "none", "leaky_relu", "none")
class _Loop(_Base):
    def forward(self, x):
        for k in range(2):
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                x = leaky(self.bn(self.conv(x)), negative_slope=0.1)
                y = self.conv2(x)
                x = self.bn2(y)
            while k > 5:
                return x
        return x


@fused_as("relu", "relu")
class _Comprehension(_Base):
    def forward(self, x):
        return sum([F.relu(self.bn(self.conv(part))) for part in (x, -x)])


@fused_as("sigmoid")
class _Methods(_Base):
    """What forward calls, and what it does not."""

    def encode(self, x, offset=0.0):
        return torch.sigmoid(self.bn(self.conv(x))) + offset

    def forward(self, x):
        return self.decode(self.encode(x, offset=1.0))

    def decode(self, z):
        return self.conv2(z)


@fused_as("relu", "sigmoid")
class _Super(_Methods):
    def forward(self, x):
        return super().forward(self.act(self.bn2(self.conv2(x))))


@fused_as("tanh")
class _Names(_Base):
    """Names that change within a class, that hide others, and that ours could hide."""

    def forward(self, x):
        chain_0 = self.layers[0](x)
        chain_0 = self.layers[1](chain_0)
        return chain_0.tanh() + FACTOR


@fused_as("none")
class _Hidden(_Base):
    def forward(self, x):
        leaky = torch.neg  # another than the module's
        return leaky(self.bn(self.conv(x)))


@fused_as("none", "relu")
class _Seen(_Base):
    """What is in between is used again: later, by a function inside, in the same statement."""

    def forward(self, x):
        y = self.bn(x)
        z = F.relu(y)
        w = self.bn2(z)
        w = F.relu(w) + z
        return w + y


@fused_as("none", "none")
class _Captured(_Base):
    def forward(self, x):
        y = x
        y = self.bn(self.conv(y))
        y = F.relu(y)
        y = self.bn2(y)
        peek = lambda: y  # noqa: E731
        return F.relu(y) + peek()


@fused_as("none")
class _LooksAtLocals(_Base):
    def forward(self, x):
        y = self.bn(x)
        z = F.relu(y)
        return z + locals()["y"]


@fused_as("none", "relu")
class _Order(_Base):
    """A call that comes before in the same statement stays before."""

    def forward(self, x):
        y = self.bn(x)
        y = torch.add(self.conv(x), F.relu(y))
        z = self.bn(y)
        return torch.cat([F.relu(z), y])


@fused_as("none")
class _KeptArgument(_Base):
    """A default argument that is given again in every call."""

    def forward(self, x, y=None):
        y = self.bn(x)
        z = F.relu(y, inplace=bool(FACTOR))
        return z


@pytest.mark.parametrize("cls", FUSED, ids=lambda c: c.__name__)
def test_a_written_method_is_the_same(cls, fused_calls):
    model = cls()
    plain = cls()
    plain.load_state_dict(model.state_dict())
    assert type(fuse(model)) is not cls and isinstance(model, cls)
    x = torch.randn(4, 3, 8, 8)
    assert_close(model(x), plain(x))
    assert fused_calls == FUSED[cls]
    assert_alike(model, plain, x, steps=1)
    method, original = type(model).forward, cls.forward
    assert inspect.signature(method) == inspect.signature(original) and method.__doc__ == original.__doc__
    assert method.__qualname__ == original.__qualname__ and method.__globals__ is original.__globals__
    assert type(unfuse(model)) is cls


def test_what_changes_later_counts(fused_calls):
    """Children, flags and names are looked up at every call."""
    model, plain = fuse(_BasicBlock()), _BasicBlock()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    shortcut = nn.Conv2d(3, 3, 1)
    for m in (model, plain):
        m.downsample, m.act = shortcut, nn.CELU()
    assert_close(model(x), plain(x))
    assert fused_calls == ["none", "none"]


def test_nothing_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    fuse(_BasicBlock())(torch.randn(2, 3, 8, 8))
    assert not caplog.records


def test_a_class_is_made_once_for_instances_alike():
    first, second, third = _Methods(), _Methods(), _Methods()
    second.bn = nn.LocalResponseNorm(2)
    third.conv2 = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    assert type(fuse(second)) is _Methods and "calls no norm" in explain(second).rows[0].reason
    assert type(fuse(first)) is type(fuse(third)) is not _Methods


def test_methods_beside_forward_are_explained():
    rows = {row.path: row.becomes for row in explain(_Methods())}
    assert [*rows] == ["conv+bn+Sigmoid()+residual"]
    assert rows["conv+bn+Sigmoid()+residual"].startswith("batch_norm_act (Sigmoid, residual)")

    class Sampler(_Methods):
        @torch.no_grad()
        def sample(self, z):
            return F.relu(self.bn2(z))

    assert {*rows, "bn2+ReLU()"} == {row.path for row in explain(Sampler())}
    assert [*explain(fuse(Sampler()))] == [*explain(Sampler())]


ACTIVATION = F.relu


class _ByName(_Base):
    def forward(self, x):
        return ACTIVATION(self.bn(self.conv(x)))


def test_functions_are_looked_up_at_every_call(monkeypatch, fused_calls):
    model, plain = fuse(_ByName()), _ByName()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert_close(model(x), plain(x))
    assert fused_calls == ["relu"]
    monkeypatch.setitem(globals(), "ACTIVATION", F.gelu)
    assert_close(model(x), plain(x))
    assert fused_calls == ["relu"]


def test_a_method_that_is_replaced_later_is_made_anew():
    def times(s):
        def forward(self, x, more=s):
            return F.relu(self.bn(self.conv(x))) * s + more

        return forward

    class Scaled(_Base):
        pass

    x, found = torch.randn(4, 3, 8, 8), []
    for s in (2.0, 3.0):
        Scaled.forward = times(s)
        torch.manual_seed(0)
        model = Scaled()
        expected = model(x)
        torch.manual_seed(0)
        found.append(fuse(Scaled()))
        assert_close(found[-1](x), expected)

    class Edited(_Base):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    fuse(Edited())
    Edited.forward.__code__ = (lambda self, x: F.relu(self.bn(self.conv(x))) + 1.0).__code__  # as reloaders do it
    assert fuse(Edited())(x).min() >= 1.0


class _Swallows(_Base):
    def forward(self, x):
        h = x
        with contextlib.suppress(ValueError):
            h = self.conv(h)
            h = self.bn(h)
        return h


def test_what_a_with_swallows_leaves_what_was_done():
    model, plain = fuse(_Swallows()), _Swallows()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 1, 1)  # batch norm refuses a single value a channel
    assert_close(model(x), plain(x))


TICK = 0


class _Ticks(_Base):
    def tick(self, x):
        global TICK
        TICK += 1
        return x

    def forward(self, x):
        h = self.tick(x)
        h = self.bn(h)
        return F.relu(h), TICK


def test_a_global_is_read_when_it_was(monkeypatch):
    monkeypatch.setitem(globals(), "TICK", 0)
    assert fuse(_Ticks())(torch.randn(4, 3, 8, 8))[1] == 1


class _OwnClass(_Base):
    hidden: int

    def train(self, mode=True):
        super(self.__class__, self).train(mode)
        return self

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def test_a_class_that_asks_for_itself_stays():
    model = _OwnClass()
    (row,) = explain(model)
    assert "super with the object's own class" in row.reason and type(fuse(model)) is _OwnClass
    fuse(model).train()

    class Annotated(_ByName):
        hidden: int

    assert inspect.get_annotations(type(fuse(Annotated()))) == inspect.get_annotations(Annotated) == {"hidden": int}

    class Own(nn.Sequential):
        def train(self, mode=True):
            return super(type(self), self).train(mode)

    model = Own(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert "own class" in explain(model).rows[0].reason and type(fuse(model)) is Own and model.train()


@pytest.mark.parametrize("make", [_ByName, lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())])
def test_tensors_without_numbers(make):
    assert fuse(make()).to("meta")(torch.empty(4, 3, 8, 8, device="meta")).shape == (4, 3, 8, 8)


def test_what_is_put_on_a_child_counts(fused_calls):
    """Padding that goes round, as texture makers patch it in; weights that another network made."""
    x = torch.randn(4, 3, 8, 8)
    for patch in (
        lambda m: setattr(m.conv, "_conv_forward", lambda x, w, b: F.conv2d(F.pad(x, (1,) * 4, "circular"), w, b)),
        lambda m: (m.bn._parameters.pop("weight"), object.__setattr__(m.bn, "weight", torch.full((3,), 2.0))),
    ):
        torch.manual_seed(0)
        model = fuse(_ByName())
        torch.manual_seed(0)
        plain = _ByName()
        for m in (model, plain):
            patch(m)
        for training in (True, False):
            with torch.set_grad_enabled(training):
                assert_close(model.train(training)(x), plain.train(training)(x))


def test_an_identity_gives_the_tensor_itself():
    x = torch.ones(64, 64)
    fuse(nn.Sequential(nn.Identity(), nn.Dropout(0.5, inplace=True))).train()(x)
    assert 0.3 < (x == 0).float().mean() < 0.7


class _Constant(_Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("image", torch.randn(4, 3, 8, 8))

    def forward(self, x):
        return F.relu(self.bn(self.conv(self.image))) + x


def test_tracing_where_a_chain_begins_with_a_constant():
    model = _Constant().eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    assert_close(torch.fx.symbolic_trace(fuse(model))(x), expected)


def test_hooks_on_all_modules_see_the_children_alone():
    model, seen = fuse(_ByName()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        model(torch.randn(4, 3, 8, 8))
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "_ByName"]


def test_wrong_channels_raise_as_before():
    for model in (_ByName(), fuse(_ByName())):
        with pytest.raises(RuntimeError):
            F.relu(model.bn(torch.randn(4, 5, 8, 8)))
        model.conv = nn.Conv2d(3, 5, 1)
        with pytest.raises(RuntimeError):
            model(torch.randn(4, 3, 8, 8))


def test_an_error_names_the_line_that_was_written():
    model = fuse(_BasicBlock())
    with pytest.raises(RuntimeError) as error:
        model(torch.randn(4, 5, 8, 8))
    frames = [f for f in traceback.extract_tb(error.value.__traceback__) if f.name == "forward"]
    assert any(f.filename == __file__ and "self." in f.line for f in frames)


def test_a_compiled_model_has_no_breaks():
    model, plain = fuse(_BasicBlock()), _BasicBlock()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), plain(x))


# --- methods drawn at random: whatever is joined, the numbers are those of the source


def _method(draw):
    """Statements over three variables, in blocks, with calls nested or in a row."""
    names = ["x", "a", "b"]

    def expression(depth=0):
        kind = draw.choice(["name", "step", "step", "step", "method", "sum", "call"] if depth < 3 else ["name"])
        inner = (lambda: expression(depth + 1)) if kind != "name" else None
        if kind == "name":
            return draw.choice(names)
        if kind == "step":
            step = draw.choice(["self.bn", "self.bn2", "self.conv", "self.act", "F.relu", "torch.tanh", "self.drop"])
            return f"{step}({inner()})"
        if kind == "method":
            return f"self.bn({inner()}).{draw.choice(['relu', 'relu_', 'sigmoid'])}()"
        if kind == "sum":
            return f"{inner()} + {inner()}"
        return f"torch.stack([{inner()}, {inner()}]).mean(0)"

    def block(depth, indent):
        lines = []
        for _ in range(draw.randint(1, 4)):
            kind = draw.choice(["assign"] * 6 + ["if", "for", "add", "peek"] if depth < 2 else ["assign"])
            if kind == "assign":
                lines.append(f"{indent}{draw.choice(names)} = {expression()}")
            elif kind == "add":
                lines.append(f"{indent}{draw.choice(names)} += {expression()}")
            elif kind == "peek":
                lines.append(f"{indent}seen.append(float({draw.choice(names)}.sum()))")
            elif kind == "if":
                lines += [f"{indent}if self.training:", *block(depth + 1, indent + "    ")]
            else:
                lines += [f"{indent}for _ in range(2):", *block(depth + 1, indent + "    ")]
        return lines

    body = ["        seen, x = [], x * 1", "        a, b = x.exp(), x.flip(2)", *block(0, "        ")]
    return ["    def forward(self, x):", *body, f"        return {expression()} + a + b + sum(seen)"]


@pytest.mark.parametrize("seed", range(40))
def test_methods_drawn_at_random(seed, tmp_path, fused_calls):
    base = [
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "class Model(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        self.bn, self.bn2, self.drop = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout(0.0)",
        "        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)",
    ]
    file = tmp_path / f"drawn_{seed}.py"
    file.write_text("\n".join([*base, *_method(random.Random(seed)), ""]))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = module.Model().double()
    fused = module.Model().double()
    fused.load_state_dict(plain.state_dict())
    fuse(fused)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    for model in (fused, plain):
        model.requires_grad_(False)
    for training in (True, False):
        fused.train(training)
        plain.train(training)
        with use_backend("reference"):  # the only one in float64
            assert_close(fused(x), plain(x), 1e-9, what=file.read_text())
    for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(a, b, 1e-9, what=name)
