"""What fuse leaves alone, what it refuses, and what explain says of both."""

import copy
import functools
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from fuse_models import Branches, Generator, HandWritten, OneNorm, ResBlock, Spectral
from torch import nn

from genai_fast import explain, fuse, unfuse
from genai_fast.fusion.explanation import NOTHING_HERE, Explanation, Row

pytestmark = pytest.mark.usefixtures("small_is_fused")


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.scale = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 2.0
        self.gain = nn.Parameter(torch.ones(()))


class _Loop(_Base):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def _by_table(function):
    table = {"function": function}

    @functools.wraps(function)
    def call(*args):
        return table["function"](*args)

    return call


class _Decorated(_Base):
    @_by_table
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class _Rebinds(_Base):
    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        self = None
        return y


class _ByKeyword(_Base):
    def forward(self, x):
        return F.relu(self.bn(input=self.conv(x)))


class _Handled(_Base):
    def forward(self, x):
        try:
            x = self.conv(x)
            x = self.bn(x)
        finally:
            pass
        return x


class _Assigned(_Base):
    forward = staticmethod(lambda x: x)


class _Changed(_Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


_Changed.forward.__code__ = _Changed.forward.__code__.replace(co_names=("F", "gelu", "bn", "conv"))

REFUSED = {
    _Loop: "calls no norm", _Decorated: "decorated", _Rebinds: "assigns to self", _ByKeyword: "calls no norm",
    _Handled: "calls no norm", _Assigned: "no plain function", _Changed: "its source is not what runs",
}  # fmt: skip


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_a_forward_that_stays(cls, fused_calls):
    model = cls()
    (row,) = explain(model)
    assert REFUSED[cls] in row.reason and row.path == "" and row.found == cls.__name__ and not row.becomes
    assert type(fuse(model)) is cls
    model(torch.randn(4, 3, 8, 8))
    assert not fused_calls


def test_a_forward_without_source_is_refused():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return self.bn(x)", namespace)
    model = namespace["Made"]()
    model.bn = nn.BatchNorm2d(3)
    assert "source" in explain(model).rows[0].reason and type(fuse(model)) is namespace["Made"]


def test_a_forward_replaced_on_the_instance_stays(fused_calls):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    hand = OneNorm(nn.BatchNorm2d(4))
    for m in (model, hand):
        m.forward = lambda x: x + 1.0
        assert type(fuse(m)) in (nn.Sequential, OneNorm)
        assert "replaced" in explain(m).rows[0].reason
        assert torch.equal(m(torch.zeros(2)), torch.ones(2))
    assert not fused_calls


def test_scripted_and_traced_models_stay():
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    for model in (torch.jit.script(plain), torch.fx.symbolic_trace(plain)):
        assert type(fuse(model)) is type(model)
        assert "generated code" in explain(model).rows[0].reason


class _MyNorm(nn.BatchNorm2d):
    pass


def test_explain_says_what_happens():
    late = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
    late[1].register_forward_hook(lambda *_: None)
    model = nn.Sequential(Generator(), Spectral(), late, nn.Sequential(_MyNorm(3), nn.LazyBatchNorm2d()), ResBlock())
    classes = [type(m) for m in model.modules()]
    rows = list(explain(model))
    assert [type(m) for m in model.modules()] == classes
    found = {row.path: row for row in rows}
    paths = "convolution by the fastest of folded, torch, folded_channels_last, channels_last, gemm, im2col, kernel"
    assert found["0.main.0+1+2"].becomes == f"batch_norm_act (ReLU); {paths}"
    assert found["0.main.0+1+2"].found == "ConvTranspose2d + BatchNorm2d + ReLU"
    assert found["0.main.6+7"].becomes == paths and found["0.main.6+7"].found == "ConvTranspose2d + Tanh"
    assert "hooks" in found["1.old.0"].reason and found["1.old.1+2"].becomes == "batch_norm_act (LeakyReLU)"
    assert "parametrized" in found["1.new.0"].reason
    assert "hooks" in found["2.1"].reason
    assert "subclass of BatchNorm2d" in found["3.0"].reason and "first call" in found["3.1"].reason
    assert found["4.conv1+bn1+relu"].becomes.startswith("batch_norm_act (ReLU)")
    assert found["4.conv2+bn2+residual+relu"].becomes.startswith("batch_norm_act (residual, ReLU)")
    *table, total = str(explain(model)).splitlines()
    assert len({line.index("batch_norm_act") for line in table if "batch_norm_act" in line}) == 1
    assert max(map(len, table)) <= 100 and len(explain(model)) == len(rows)
    text = " ".join(" ".join(table).split())
    assert all(f"{row.path or '.'} {row.found} " in text for row in rows)
    fused = sum(bool(row.becomes) for row in rows)
    holders = sum(row.path in ("0", "1") for row in rows)  # whose forward only calls its parts
    assert total == f"total: {fused} parts run fused, {len(rows) - fused - holders} left to PyTorch"
    assert list(explain(fuse(model))) == rows
    assert "calls no norm" in explain(nn.Sequential(OneNorm(nn.Identity()))).rows[0].reason


class _Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return 2 * self.net(x)


def test_a_module_that_only_calls_its_parts_is_not_left_alone():
    found = explain(_Holder())
    rows, table = {row.path: row for row in found}, str(found).splitlines()
    (line,) = (line for line in table if line.startswith(". "))
    assert rows[""].reason.endswith(NOTHING_HERE) and line.endswith("  holds the parts below it")
    assert table[-1] == "total: 1 part runs fused, 0 left to PyTorch"


def test_long_names_leave_the_reason_its_own_lines():
    row = Row("a" * 80, "Conv2d", "", "a reason " * 20)
    assert max(map(len, str(Explanation((row,))).splitlines()[1:-1])) <= 100
    assert "left alone: a reason" in str(Explanation((row,)))


def test_nothing_is_logged(caplog):
    """PyTorch logs a warning where it is asked about tracing by one of two names."""
    torch.fx._symbolic_trace.is_fx_tracing_warning.cache_clear()
    model = fuse(ResBlock())
    with caplog.at_level("WARNING"):
        model(torch.randn(2, 3, 4, 4))
    assert not caplog.records


def test_branches_are_not_joined():
    rows = {row.path for row in explain(Branches())}
    assert rows == {"bn1", "bn2+ReLU()"}


# --- wrappers


def _data_parallel(m):
    return nn.DataParallel(m)


def _compiled(m):
    return torch.compile(m, backend="eager")


def _compiled_in_place(m):
    m.compile(backend="eager")
    return m


WRAPPERS = {_data_parallel: "DataParallel", _compiled: "OptimizedModule", _compiled_in_place: "a compiled module"}


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda w: w.__name__)
def test_a_wrapped_model_is_refused(wrap):
    wrapped = wrap(Generator())
    for name, function in (("fuse", fuse), ("unfuse", unfuse)):
        with pytest.raises(TypeError, match=rf"{name}: model: .*got {WRAPPERS[wrap]}; {name} the model first"):
            function(wrapped)
        with pytest.raises(TypeError, match=rf"{name}: 0\.1: .*got {WRAPPERS[wrap]}"):
            function(nn.Sequential(nn.Sequential(nn.ReLU(), wrapped)))
    assert type(wrap(fuse(Generator()))(torch.randn(2, 6, 1, 1))) is torch.Tensor
    assert any("fuse before wrapping" in row.reason for row in explain(wrapped))


def test_what_is_no_module_is_refused():
    for function in (fuse, unfuse, explain):
        with pytest.raises(TypeError, match=r"expected an nn\.Module, got list"):
            function([nn.ReLU()])


class _Registered(nn.Module):
    known: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, name, **more):
        super().__init_subclass__(**more)
        assert cls.__name__ not in cls.known, "subclassed once more"
        cls.known[cls.__name__] = name


class _Named(_Registered, name="a name"):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.norm(x))


def test_a_class_is_not_told_of_its_fused_one():
    model = fuse(_Named())
    assert type(model) is not _Named and _Registered.known == {"_Named": "a name"}
    assert model(torch.randn(2, 3, 4, 4)).min() >= 0


def test_a_fused_written_forward_can_be_traced_by_fx():
    plain = HandWritten().eval()
    traced = torch.fx.symbolic_trace(fuse(copy.deepcopy(plain)))
    z = torch.randn(2, 6)
    assert_close(traced(z), plain(z))
    assert {node.target for node in traced.graph.nodes if node.op == "call_module"} >= {"bn1", "bn2", "conv3"}
