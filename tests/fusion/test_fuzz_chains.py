"""Random models run fused as they run plain; the fuzzer finds what it looks for, and says how to see it again."""

import os
import warnings

import pytest
import torch
from torch import nn

from bench import fuzz_chains, random_models
from genai_fast import ops
from genai_fast.fusion import norms, operands

COUNT, EACH = 200, 20
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("first", range(0, COUNT, EACH))
def test_random_models_run_fused_as_plain(first, monkeypatch, tmp_path):
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path))
    found = {seed: fuzz_chains.differences(seed) for seed in range(first, first + EACH)}
    assert not any(found.values()), "\n".join(fuzz_chains.report(s, lines) for s, lines in found.items() if lines)


def test_a_seed_draws_the_same_model():
    a, b = (random_models.draw(7) for _ in range(2))
    assert repr(a.module) == repr(b.module) and a.source == b.source and a.shape == b.shape
    assert all(torch.equal(p, q) for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True))


def test_models_are_of_many_kinds():
    drawn = [random_models.draw(seed) for seed in range(COUNT)]
    kinds = {type(m).__name__ for made in drawn for m in made.module.modules()}
    assert len(kinds) > 50 and COUNT / 4 < sum(bool(made.source) for made in drawn) < 3 * COUNT / 4


def _norm_off(monkeypatch):
    op = ops.batch_norm_act
    monkeypatch.setattr(ops, "batch_norm_act", lambda *args, **named: op(*args, **named) * 1.001)


def _gradient_off(monkeypatch):
    op = ops.batch_norm_act

    def call(x, *args, **named):
        return op(x.detach() * 0.9 + x * 0.1, *args, **named)

    monkeypatch.setattr(ops, "batch_norm_act", call)


def _draws(monkeypatch):
    ours, *others = norms.NORMS
    option = ours._replace(run=lambda chain, x: (torch.rand(1), ours.run(chain, x))[1])
    monkeypatch.setattr(norms, "NORMS", (option, *others))


def _uncounted(monkeypatch):
    monkeypatch.setattr(operands.Norm, "counted", lambda self: self.momentum or 0.0)


def _hook_ignored(monkeypatch):
    monkeypatch.setattr("genai_fast.fusion.chains.obstacle", lambda child: "")


def _layout(monkeypatch):
    monkeypatch.setattr("genai_fast.fusion.run.relaid", lambda x, wanted: x)
    choosing = fuzz_chains._choosing
    monkeypatch.setattr(fuzz_chains, "_choosing", lambda name, seed: choosing("channels_last", seed))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_norm_off, "output 0: error"), (_gradient_off, "gradient of"), (_draws, "the state of the generator"),
        (_uncounted, "num_batches_tracked"), (_hook_ignored, "hooks:"), (_layout, "strides"),
    ],
)  # fmt: skip
def test_faults_are_found(fault, said, monkeypatch, tmp_path):
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path))
    fault(monkeypatch)
    found = (fuzz_chains.differences(seed) for seed in range(COUNT))
    assert any(said in line for lines in found for line in lines)


def test_the_command_names_the_seed_and_the_model(monkeypatch, capsys):
    monkeypatch.setattr(fuzz_chains, "differences", lambda seed: ["output 0: other"] * (seed == 3_000_001))
    monkeypatch.setattr("sys.argv", ["fuzz_chains", "--count", "3", "--seed", "3"])
    assert fuzz_chains.main() == 1
    said = capsys.readouterr().out
    assert "--only 3000001: 1 differences" in said and repr(random_models.draw(3_000_001).module) in said
    assert said.splitlines()[-1] == "3 chains, 1 differences, seed 3"
    monkeypatch.setattr("sys.argv", ["fuzz_chains", "--only", "7"])
    assert fuzz_chains.main() == 0


def test_a_model_that_magnifies_roundings_is_no_difference():
    torch.manual_seed(0)
    made = random_models.Model(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (2, 4), [], "")
    how = fuzz_chains.Circumstances(
        True, "grad", False, torch.float32, "contiguous", True, True, False, "", True, "torch", False, False
    )
    x = torch.ones(2, 4)  # the norm divides a rounding by sqrt(eps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = fuzz_chains._run(made.module, made, how, x, 0, False)

    def off_by(size):
        shifted = plain._replace(outputs=[y + size for y in plain.outputs])
        return [*fuzz_chains._compared(made, how, x, 0, plain, shifted)]

    assert not off_by(5e-6) and off_by(1e-2)


def test_a_model_that_ends_the_process_ends_only_its_own(monkeypatch):
    """PyTorch's own kernels may crash, and then there is nothing to compare."""

    def differences(seed):
        if seed in (2, 4):
            os.abort()
        return ["other"] * (seed == 3)

    def plainly(seed):
        if seed == 2:
            os.abort()
        return []

    monkeypatch.setattr(fuzz_chains, "differences", differences)
    monkeypatch.setattr(fuzz_chains, "_plainly", plainly)
    found = dict(fuzz_chains.compared(range(1, 6)))
    assert found.pop(4) == ["the fused model ends the process, the plain one does not"]
    assert found == {1: [], 2: [], 3: ["other"], 5: []}


def test_what_pytorch_itself_gets_wrong_is_not_compared():
    torch.manual_seed(0)
    made = random_models.Model(nn.Linear(4, 4), (2, 4), [], "")
    how = fuzz_chains.Circumstances(
        False, "grad", False, torch.float32, "contiguous", True, True, False, "", True, "torch", False, False
    )
    x = torch.randn(2, 4)
    plain = fuzz_chains._run(made.module, made, how, x, 0, False)

    def differs(wrong):
        theirs = plain._replace(outputs=[y * wrong for y in plain.outputs])
        return [*fuzz_chains._compared(made, how, x, 0, theirs, plain._replace(outputs=[-y for y in plain.outputs]))]

    assert differs(1.0) and not differs(1e30)


def test_an_error_that_comes_later_is_no_difference():
    made = random_models.Model(nn.ReLU(), (2, 4), [], "")
    raised = fuzz_chains.Result(("backward 0", "RuntimeError"), [], {}, {}, [], [], torch.zeros(1), [], "")

    def differs(stage, kind="RuntimeError"):
        return [*fuzz_chains._compared(made, None, None, 0, raised, raised._replace(error=(stage, kind)))]

    assert not differs("backward 2") and not differs("", "")
    assert differs("backward 2", "TypeError") and differs("prepare")
