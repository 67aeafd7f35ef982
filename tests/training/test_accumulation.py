"""A step in parts is the whole batch's, whatever the loss is a mean over."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from step_models import equal
from torch import nn

from genai_fast import models, ops
from genai_fast.training import Step
from genai_fast.training.meter import over_all

CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0])


def counted(y):
    return (y >= 0).sum()


LOSSES = {
    "torch": F.cross_entropy,
    "class weights": lambda x, y: F.cross_entropy(x, y, weight=CLASS_WEIGHTS),
    "smoothing, scaled": lambda x, y: 2 * F.cross_entropy(x, y, label_smoothing=0.1),
    "nll": lambda x, y: F.nll_loss(x.log_softmax(1), y),
    "spatial": lambda x, y: F.cross_entropy(x.t()[None], y[None]),
    "ops": ops.cross_entropy,
    "ops in place": lambda x, y: ops.cross_entropy(x * 1, y, inplace=True),
    "linear": lambda x, y: ops.linear_cross_entropy(x, torch.eye(4), y),
    "masked": lambda x, y: (F.cross_entropy(x, y, reduction="none") * (y >= 0)).sum() / counted(y),
    "sum over count": lambda x, y: ops.cross_entropy(x, y, reduction="sum").float() / counted(y),
    "with a penalty": lambda x, y: F.cross_entropy(x, y) + 0.0 * x.sum(),
    "dict": lambda x, y: {"accuracy": torch.ones(()), "loss": F.cross_entropy(x, y)},
    "says its weight": lambda x, y: {"loss": F.cross_entropy(x, y).exp().log(), "weight": counted(y)},
}


def stepped(loss, y, parts, **settings):
    """A step's result and the weights after it."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4), torch.randn(len(y), 3)
    step = Step(lambda x, y: loss(net(x), y), torch.optim.SGD(net.parameters(), lr=1.0), accumulate=parts, **settings)
    result = step(x, y)
    return result["loss"] if isinstance(result, dict) else result, net, step


TARGETS = {"uneven": [0, -100, 1, 2], "a part of none": [0, 1, -100, -100], "first of none": [-100, -100, 1, 3, 2]}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_mean_over_the_targets_that_count_is_the_whole_batchs(loss, targets, parts):
    y = torch.tensor(TARGETS[targets])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (whole, net, _), (found, other, step) = (stepped(LOSSES[loss], y, n, clip=5.0) for n in (1, parts))
    torch.testing.assert_close(found, whole)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert step.skipped() == (0, 0)


def test_known_values():
    loss, net, _ = stepped(F.cross_entropy, torch.tensor([0, -100, 1, 2]), 2)
    assert float(loss) == pytest.approx(1.57526, abs=1e-5)
    torch.testing.assert_close(net.bias.detach(), torch.tensor([-0.445, -0.285, -0.108, -0.312]), atol=1e-3, rtol=0)
    assert float(stepped(F.cross_entropy, torch.tensor([0, 1, -100, -100]), 2)[0]) == pytest.approx(1.351405, abs=1e-6)


@pytest.mark.parametrize("loss", ["torch", "masked", "says its weight"])
def test_a_batch_without_any_counted_target_updates_nothing(loss):
    before = stepped(LOSSES[loss], torch.full((4,), -100), 1)[1]
    found, net, step = stepped(LOSSES[loss], torch.full((4,), -100), 2)
    assert found.isnan() and step.skipped() == (1, 1) and equal(net, before)


def test_float16_and_many_targets():
    y = torch.arange(300) % 4
    y[:140] = -100
    (whole, net, _), (found, other, _) = (stepped(F.cross_entropy, y, n, precision="float16") for n in (1, 2))
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=1e-3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_the_sum_of_two_kinds_of_means_is_warned_of():
    def mixed(x, y):
        return F.cross_entropy(x, y) + x.square().mean()

    with pytest.warns(UserWarning, match="adds a mean over all rows to one over the targets that count"):
        stepped(mixed, torch.tensor([0, -100, 1, 2]), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(mixed, torch.tensor([0, -100, 1, 2]), 1)
        (whole, *_), (found, *_) = (stepped(mixed, torch.tensor([0, 3, 1, 2]), n) for n in (1, 2))
    torch.testing.assert_close(found, whole)


def test_what_a_loss_counts_is_summed():
    y = torch.tensor([0, -100, 1, 2])
    net = nn.Linear(3, 4)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    step = Step(lambda x, y: {"weight": counted(y), "loss": F.cross_entropy(net(x), y)}, sgd, accumulate=2)
    assert int(step(torch.randn(4, 3), y)["weight"]) == 3


def test_parts_of_translations_weigh_their_tokens():
    source, target = torch.randint(1, 20, (2, 8)), torch.randint(1, 20, (2, 8))
    lengths = torch.tensor([8, 1])
    results, weights = [], []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = models.Seq2Seq(20, 0, 8, 1, 1, 8, dropout=0)
        step = Step(model, torch.optim.SGD(model.parameters(), lr=1.0), accumulate=parts)
        results.append(step(source, torch.tensor([8, 8]), target, lengths))
        weights.append(model)
    torch.testing.assert_close(*results)
    for a, b in zip(weights[0].parameters(), weights[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(results[1].loss, results[1].nats / results[1].tokens)
    assert over_all({"loss": 9.0, "nats": 6.0, "tokens": 2.0})["loss"] == 3.0 and over_all({"loss": 9.0})["loss"] == 9.0


@pytest.mark.parametrize("parts", [1, 4])
def test_annealing_counts_updates(parts):
    model = models.TextVAE(20, 0, annealing=100)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            step(torch.randint(1, 20, (8, 5)), torch.full((8,), 5))
    assert int(model.steps) == 5
    model.training_step(torch.randint(1, 20, (8, 5)), torch.full((8,), 5))
    assert int(model.steps) == 6
