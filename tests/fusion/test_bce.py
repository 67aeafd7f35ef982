"""layers.BCELoss is nn.BCELoss, also where a sigmoid saturates, and under autocast."""

import pytest
import torch
from torch import nn

from genai_fast import layers, ops

LOGITS = torch.tensor([[0.0, 3.0, -3.0, 16.0], [-16.0, 20.0, -20.0, 120.0]])
TARGETS = torch.tensor([[1.0, 0.0, 0.3, 0.0], [1.0, 0.0, 1.0, 0.0]])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_pytorchs_where_a_sigmoid_saturates_too(reduction, weighted):
    weight = torch.rand(4) if weighted else None
    results = []
    for cls in (layers.BCELoss, nn.BCELoss):
        x = LOGITS.clone().requires_grad_()
        loss = cls(weight, reduction=reduction)(torch.sigmoid(x), TARGETS)
        loss.sum().backward()
        results.append((loss, x.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    if reduction == "none" and not weighted:
        assert results[0][0][1, 3] == 100.0 and results[0][1][1, 3] == 0.0  # sigmoid(120) is 1


def test_under_autocast_it_is_the_loss_in_float32():
    x = torch.sigmoid(LOGITS).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = layers.BCELoss()(x, TARGETS)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, nn.BCELoss()(x.float(), TARGETS))


def test_a_vae_of_probabilities_costs_the_same():
    recon, mu = torch.sigmoid(LOGITS), torch.zeros(2, 3)
    losses = ops.vae_loss(recon, TARGETS, mu, mu, from_logits=False, reduction="sum")
    torch.testing.assert_close(losses.reconstruction, layers.BCELoss(reduction="sum")(recon, TARGETS))


def test_what_pytorch_refuses():
    for cls in (layers.BCELoss, nn.BCELoss):
        with pytest.raises(ValueError, match="target size"):
            cls()(torch.rand(3), torch.rand(4))
