"""The peers of speed figures: checkpoints load both ways, and both compute the same."""

import pytest
import torch
from alike import assert_close

from genai_fast.models import (
    Autoencoder,
    ConditionalGenerator,
    ConditionalVAE,
    ConvVAE,
    DCGANDiscriminator,
    DCGANGenerator,
    DenseDiscriminator,
    DenseGenerator,
    DenseGeneratorK4,
    MLPDiscriminator,
    MLPGenerator,
)
from genai_fast.models.autoencoder.plain import PlainAutoencoder
from genai_fast.models.conv_vae.plain import PlainConditionalVAE, PlainConvVAE
from genai_fast.models.gan.plain import (
    PlainConditionalGenerator,
    PlainDCGANDiscriminator,
    PlainDCGANGenerator,
    PlainDenseDiscriminator,
    PlainDenseGenerator,
    PlainDenseGeneratorK4,
    PlainMLPDiscriminator,
    PlainMLPGenerator,
)

SHAPE, WIDE = (1, 6, 5), (16, 8)
# Ours, the peer, and the shape of one input: a latent or an image.
PAIRS = {
    "mlp-generator": (lambda: MLPGenerator(SHAPE, latent=4, widths=WIDE), PlainMLPGenerator, (SHAPE, 4, WIDE), (4,)),
    "mlp-discriminator": (lambda: MLPDiscriminator(SHAPE, widths=WIDE), PlainMLPDiscriminator, (SHAPE, WIDE), SHAPE),
    "dcgan-generator": (lambda: DCGANGenerator(latent=8, width=4), PlainDCGANGenerator, (64, 8, 4), (8, 1, 1)),
    "dcgan-generator-28": (
        lambda: DCGANGenerator(28, latent=8, width=4, channels=1),
        PlainDCGANGenerator,
        (28, 8, 4, 1),
        (8,),
    ),
    "dcgan-discriminator": (lambda: DCGANDiscriminator(width=4), PlainDCGANDiscriminator, (64, 4), (3, 64, 64)),
    "dense-generator": (lambda: DenseGenerator(8, side=2), PlainDenseGenerator, (8, 1, 2), (8,)),
    "dense-generator-k4": (lambda: DenseGeneratorK4(8, side=2), PlainDenseGeneratorK4, (8, 1, 2), (8,)),
    "dense-discriminator": (
        lambda: DenseDiscriminator(8, dropout=0),
        PlainDenseDiscriminator,
        (8, 1, (64, 128), 0),
        (1, 8, 8),
    ),
}
FULL = {
    MLPGenerator: PlainMLPGenerator,
    MLPDiscriminator: PlainMLPDiscriminator,
    DCGANGenerator: PlainDCGANGenerator,
    DCGANDiscriminator: PlainDCGANDiscriminator,
    ConditionalGenerator: PlainConditionalGenerator,
    ConditionalVAE: PlainConditionalVAE,
    Autoencoder: PlainAutoencoder,
    DenseGenerator: PlainDenseGenerator,
    DenseGeneratorK4: PlainDenseGeneratorK4,
    DenseDiscriminator: PlainDenseDiscriminator,
    ConvVAE: PlainConvVAE,
}


def _load_both_ways(ours, peer):
    assert [*ours.state_dict()] == [*peer.state_dict()]
    ours.load_state_dict(peer.state_dict())
    peer.load_state_dict(ours.state_dict())


def _shapes(model):
    return {key: (p.shape, p.dtype) for key, p in model.state_dict().items()}


@pytest.mark.parametrize("name", PAIRS)
def test_checkpoints_load_both_ways_and_compute_the_same(name):
    torch.manual_seed(0)
    make, peer, arguments, shape = PAIRS[name]
    ours, peer, x = make(), peer(*arguments), torch.randn(6, *shape)
    _load_both_ways(ours, peer)
    for training in (True, True, False):
        found, expected = ours.train(training)(x), peer.train(training)(x)
        assert_close(found.sigmoid() if "discriminator" in name else found, expected)
    for key, value in peer.state_dict().items():  # running statistics too
        assert_close(ours.state_dict()[key].float(), value.float(), what=key)


def test_the_loss_of_discriminators_is_bce():
    torch.manual_seed(0)
    ours, peer = MLPDiscriminator(SHAPE, widths=WIDE), PlainMLPDiscriminator(SHAPE, WIDE)
    _load_both_ways(ours, peer)
    x, real = torch.randn(9, *SHAPE), torch.randint(2, (9,)).float()
    found = torch.nn.functional.binary_cross_entropy_with_logits(ours(x), real)
    expected = torch.nn.functional.binary_cross_entropy(peer(x), real)
    found.backward()
    expected.backward()
    assert_close(found, expected)
    for (name, p), q in zip(ours.named_parameters(), peer.parameters(), strict=True):
        assert_close(p.grad, q.grad, what=name)


def test_conditional_generators():
    torch.manual_seed(0)
    ours, peer = ConditionalGenerator(3, 28, latent=8, width=4), PlainConditionalGenerator(3, 28, 8, 4)
    _load_both_ways(ours, peer)
    z, labels = torch.randn(6, 8), torch.arange(6) % 3
    for training in (True, False):
        assert_close(ours.train(training)(z, labels), peer.train(training)(z, labels))


@pytest.mark.parametrize(
    ("kinds", "size", "channels", "widths"),
    [
        ((ConvVAE, PlainConvVAE), 8, 1, (6, 8)),
        ((ConvVAE, PlainConvVAE), 28, 3, (4, 6)),
        ((ConditionalVAE, PlainConditionalVAE), 8, 3, (6, 8)),
        ((Autoencoder, PlainAutoencoder), 8, 3, (6, 8)),
    ],
)
def test_conv_coders(kinds, size, channels, widths, monkeypatch):
    torch.manual_seed(0)
    classes = (3,) if kinds[0] is ConditionalVAE else ()
    ours = kinds[0](*classes, size, channels=channels, latent=4, widths=widths)
    peer, x = kinds[1](*classes, size, channels, 4, widths), (torch.rand(6, channels, size, size) * 2 - 1,)
    x += (torch.arange(6) % 3,) if classes else ()
    _load_both_ways(ours, peer)
    if kinds[0] is not Autoencoder:
        eps = torch.randn(6, 4)
        monkeypatch.setattr(peer, "reparameterize", lambda mu, logvar: mu + eps * torch.exp(0.5 * logvar))
        monkeypatch.setattr(
            "genai_fast.ops.reparameterize", lambda mu, logvar, seed=None: peer.reparameterize(mu, logvar)
        )
    for training in (True, False):
        for a, b in zip(ours.train(training)(*x), peer.train(training)(*x), strict=True):
            assert_close(a, b)
        found, expected = ours.training_step(*x).loss, peer.loss(*x)
        assert_close(found, expected)
    found.backward()
    expected.backward()
    for (name, p), q in zip(ours.named_parameters(), peer.named_parameters(), strict=True):
        assert name == q[0]
        assert_close(p.grad, q[1].grad, 1e-4, what=name)


@pytest.mark.parametrize("ours", FULL, ids=lambda cls: cls.__name__)
def test_in_full_size_keys_and_shapes_are_the_same(ours):
    with torch.device("meta"):
        assert _shapes(ours()) == _shapes(FULL[ours]())
