"""What stands under an `if` on a setting, in a block that lets exceptions pass, and sums in other spellings."""

import contextlib
import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close, assert_gradients, calls_of, step, with_statistics
from torch import nn

from genai_fast import explain, fuse, unfuse

pytestmark = pytest.mark.usefixtures("small_is_fused")

C = 8


class Base(nn.Module):
    def __init__(self, act=True, norm=True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.act = nn.ReLU(inplace=True) if act else None
        self.norm = nn.BatchNorm2d(C) if norm else None
        self.kind, self.skip = "relu" if act else "none", act


class OnAChild(Base):
    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        if self.act:
            x = self.act(x)
        return x


class IsNotNone(Base):
    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.act is not None:
            return self.act(x)
        return x


class BothOptional(Base):
    def forward(self, x):
        x = self.conv(x)
        if self.norm:
            x = self.norm(x)
        if self.act:
            x = self.act(x)
        return x


class ByName(Base):
    def forward(self, x):
        out = self.bn(self.conv(x))
        if self.kind == "tanh":
            out = torch.tanh(out)
        elif self.kind == "relu":
            out = F.relu(out)
        return out + 1


class InOneLine(Base):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.act(x) if self.act is not None else x


class ByArgument(Base):
    def forward(self, x, activate=True):
        x = self.bn(self.conv(x))
        if activate and self.skip:
            x = F.relu(x)
        return x


class SumUnderIf(Base):
    def forward(self, x):
        out = self.bn(self.conv(x))
        if self.skip:
            out = out + x
        return F.relu(out)


SETTINGS = (OnAChild, IsNotNone, BothOptional, ByName, InOneLine, ByArgument, SumUnderIf)


def assert_step(fused, plain, x):
    """One step, in training and in evaluation."""
    for training in (True, False):
        (found, gradients), (expected, wanted) = (step(m.train(training), x) for m in (fused, plain))
        assert_close(found[0], expected[0], 1e-4)
        assert_gradients(gradients, wanted)
        assert [*gradients] == [*wanted]
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_close(a, b, 1e-4)


def fused_pair(make):
    torch.manual_seed(0)
    plain = with_statistics(make())
    return fuse(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_activations_under_a_setting(cls, act):
    fused, plain = fused_pair(lambda: cls(act))
    with calls_of("batch_norm_act") as made:
        assert_step(fused, plain, torch.randn(2, C, 6, 6))
    activated = "relu" in [args[8] for args in made]
    assert activated == (act or cls is SumUnderIf) and made
    assert type(unfuse(fused)) is cls


def test_a_setting_is_read_at_every_call():
    fused, plain = fused_pair(OnAChild)
    x = torch.randn(2, C, 6, 6)
    for change in (lambda m: setattr(m, "act", None), lambda m: setattr(m, "act", nn.Tanh())):
        for model in (fused, plain):
            change(model)
        assert_step(fused, plain, x)


class OnTheResult(Base):
    def forward(self, x):
        x = self.bn(self.conv(x))
        if x.mean() > 0:
            x = self.act(x)
        return x


class OnAProperty(Base):
    seen = 0

    @property
    def chosen(self):
        OnAProperty.seen += 1
        return int(self.bn.num_batches_tracked) % 2

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.chosen:
            x = self.act(x)
        return x


class OnStatistics(Base):
    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.bn.num_batches_tracked > 1:
            x = self.act(x)
        return x


class AskedByCall(Base):
    def ask(self):
        return int(self.bn.num_batches_tracked) % 2

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.ask():
            x = self.act(x)
        return x


class UsedAfter(Base):
    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.skip:
            y = F.relu(x)
            return x + y
        return x


@pytest.mark.parametrize(
    "cls", [OnTheResult, OnAProperty, OnStatistics, AskedByCall, UsedAfter], ids=lambda c: c.__name__
)
def test_other_tests_are_left_alone(cls):
    fused, plain = fused_pair(cls)
    with calls_of("batch_norm_act") as made:
        assert_step(fused, plain, torch.randn(2, C, 6, 6))
    assert {args[8] for args in made} <= {"none"}


# --- blocks


class Dummy:
    """As a library's manager that does nothing."""

    def __enter__(self):
        return None

    def __exit__(self, *exception):
        return False


class Silent(Dummy):
    def __exit__(self, *exception):
        return True


@contextlib.contextmanager
def quiet():
    with contextlib.suppress(ValueError):
        yield


class InABlock(Base):
    def forward(self, x, mixed=False):
        with torch.autocast("cpu") if mixed else Dummy() as precision:
            x = self.bn(self.conv(x))
            x = self.act(x)
        return x if precision is None else x + 0


class InNothing(Base):
    def forward(self, x):
        with contextlib.nullcontext():
            return self.act(self.bn(self.conv(x)))


class InSilence(Base):
    def forward(self, x):
        with Silent():
            x = self.bn(self.conv(x))
            x = self.act(x)
        return x


class InAGenerator(Base):
    def forward(self, x):
        with quiet():
            x = self.bn(self.conv(x))
            x = self.act(x)
        return x


@pytest.mark.parametrize(
    ("cls", "joined"), [(InABlock, True), (InNothing, True), (InSilence, False), (InAGenerator, False)]
)
def test_blocks_that_let_exceptions_pass(cls, joined):
    fused, plain = fused_pair(cls)
    with calls_of("batch_norm_act") as made:
        assert_step(fused, plain, torch.randn(2, C, 6, 6))
    assert ("relu" in [args[8] for args in made]) == joined


# --- sums


class ByTorch(Base):
    def forward(self, x):
        return F.relu(torch.add(self.bn(self.conv(x)), x))


class ByTorchLeft(Base):
    def forward(self, x):
        return torch.relu(torch.add(x, self.bn(self.conv(x))))


class ByOperator(Base):
    def forward(self, x):
        out = self.bn(self.conv(x))
        out = operator.add(out, x)
        return self.act(out)


class ByMethod(Base):
    def forward(self, x):
        out = self.bn(self.conv(x)).add(x)
        return self.act(out)


class InPlace(Base):
    def forward(self, x):
        out = self.bn(self.conv(x))
        out.add_(x)
        return F.relu(out)


class InPlaceExpression(Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)).add_(x))


SPELLINGS = (ByTorch, ByTorchLeft, ByOperator, ByMethod, InPlace, InPlaceExpression)


@pytest.mark.parametrize("cls", SPELLINGS, ids=lambda cls: cls.__name__)
def test_sums_however_spelled(cls):
    fused, plain = fused_pair(cls)
    with calls_of("batch_norm_act") as made:
        assert_step(fused, plain, torch.randn(2, C, 6, 6))
    assert [args[10] is not None for args in made] == [True, True]
    assert any("residual" in row.becomes for row in explain(plain))


class ChangesTheResidual(Base):
    def forward(self, x):
        residual = x.clone()
        y = residual.add_(self.bn(self.conv(x)))
        return y + residual


class WithAFactor(Base):
    def forward(self, x):
        return F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


class ASet(Base):
    def forward(self, x):
        seen = set()
        y = self.bn(self.conv(x))
        seen.add(y)
        return F.relu(y) + len(seen)


@pytest.mark.parametrize("cls", [ChangesTheResidual, WithAFactor, ASet], ids=lambda cls: cls.__name__)
def test_other_sums_are_left_alone(cls):
    fused, plain = fused_pair(cls)
    with calls_of("batch_norm_act") as made:
        assert_step(fused, plain, torch.randn(2, C, 6, 6))
    assert all(args[10] is None for args in made)


def test_another_sum_set_later_is_called(monkeypatch):
    fused, _ = fused_pair(ByTorch)
    own, x = torch.add, torch.randn(2, C, 6, 6)
    before = fused(x)
    monkeypatch.setattr(torch, "add", lambda a, b: own(a, b) * 2)
    assert_close(fused.train(False)(x), F.relu(2 * (fused.bn(fused.conv(x)) + x)), 1e-4)
    assert before.shape == x.shape
