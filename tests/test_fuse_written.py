"""Methods that somebody wrote: what fuse joins in them, and that it joins nothing that anything else can see."""

import importlib.util
import inspect
import random
import traceback

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_close
from torch import nn
from torch.nn.functional import leaky_relu as leaky

from genai_fast import explain, fuse, unfuse, use_backend

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


@fused_as("relu", "none")
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
        m.downsample, m.act = shortcut, nn.ELU()
    assert_close(model(x), plain(x))
    assert fused_calls == ["none", "none"]


def test_a_class_is_made_once_for_instances_alike():
    first, second, third = _Methods(), _Methods(), _Methods()
    second.bn = nn.GroupNorm(1, 3)
    third.conv2 = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    assert type(fuse(second)) is _Methods and "calls no batch norm" in explain(second).rows[0].reason
    assert type(fuse(first)) is type(fuse(third)) is not _Methods


def test_methods_beside_forward_are_explained():
    rows = {row.path: row.becomes for row in explain(_Methods())}
    assert [*rows] == ["conv+bn+Sigmoid()"] and rows["conv+bn+Sigmoid()"].startswith("batch_norm_act (Sigmoid)")

    class Sampler(_Methods):
        @torch.no_grad()
        def sample(self, z):
            return F.relu(self.bn2(z))

    assert ("", "sample: it is decorated") in {(row.path, row.reason) for row in explain(Sampler())}
    assert [*explain(fuse(Sampler()))] == [*explain(Sampler())]


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
        "import torch", "import torch.nn.functional as F", "from torch import nn", "class Model(nn.Module):",
        "    def __init__(self):", "        super().__init__()",
        "        self.bn, self.bn2, self.drop = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout(0.0)",
        "        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)",
    ]  # fmt: skip
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
