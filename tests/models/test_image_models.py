"""GANs' networks: shapes, the keys people's checkpoints have, the same as stock modules; and every named model."""

import copy
import itertools

import pytest
import torch
from alike import assert_alike
from torch import nn

from genai_fast import models, unfuse
from genai_fast.models import MODELS
from genai_fast.models.gan.dcgan import DCGANDiscriminator, DCGANGenerator, dcgan_init
from genai_fast.models.gan.dense import DenseDiscriminator, DenseGenerator, DenseGeneratorK4, MLPDiscriminator

SMALL = {
    **{
        f"generator-{s}": (lambda s=s: DCGANGenerator(s, latent=8, width=4), (8,), (3, s, s)) for s in (28, 32, 64, 128)
    },
    **{f"discriminator-{s}": (lambda s=s: DCGANDiscriminator(s, width=4), (3, s, s), ()) for s in (28, 32, 64, 128)},
    "dense": (lambda: DenseGenerator(8, side=2), (8,), (1, 8, 8)),
    "dense-k4": (lambda: DenseGeneratorK4(8, side=2, channels=3), (8,), (3, 8, 8)),
    "dense-keras": (lambda: DenseGenerator(8, side=2, slope=0.3, eps=1e-3, momentum=0.01), (8,), (1, 8, 8)),
    "dense-k4-norms": (
        lambda: DenseGeneratorK4(8, side=2, slope=0.3, batch_norm=True, eps=1e-3, last_kernel=3),
        (8,),
        (1, 8, 8),
    ),
    "dense-discriminator-norms": (
        lambda: DenseDiscriminator(8, dropout=0.0, slope=0.3, batch_norm=True, eps=1e-3),
        (1, 8, 8),
        (),
    ),
    "mlp-discriminator-keras": (lambda: MLPDiscriminator((1, 8, 8), widths=(16,), slope=0.3), (1, 8, 8), ()),
    "dense-discriminator": (lambda: DenseDiscriminator(8, dropout=0.0), (1, 8, 8), ()),
}


def _plain(model):
    """The same on stock modules."""
    model = copy.deepcopy(model)
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Sequential):
            setattr(model, name, nn.Sequential(*map(_plain_block, child)))
    return model


def _plain_block(child):
    return nn.Sequential(*child) if isinstance(child, nn.Sequential) else child


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_the_same_as_stock_modules(name):
    torch.manual_seed(0)
    make, given, made = SMALL[name]
    model = make()
    plain, x = _plain(model), torch.randn(3, *given)
    assert model(x).shape == (3, *made)
    if made:
        assert model(x).abs().max() <= 1
    plain.load_state_dict(model.state_dict())  # the forward above moved running statistics
    assert_alike(model, plain, x, steps=2)
    assert unfuse(model) is model


def test_settings_of_kerass_layers():
    """Of each layer that has them; norms take the place of biases."""
    settings = dict(slope=0.3, eps=1e-3, momentum=0.01)
    k4 = DenseGeneratorK4(batch_norm=True, last_kernel=3, **settings)
    discriminator = DenseDiscriminator(batch_norm=True, **settings)
    for model, norms in ((DenseGenerator(**settings), 3), (k4, 3), (discriminator, 2)):
        found = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        assert [(m.eps, m.momentum) for m in found] == [(1e-3, 0.01)] * norms
        assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.3}
    assert [m.kernel_size for m in k4.main if isinstance(m, nn.Conv2d)] == [(3, 3)]
    for model in (k4, discriminator):
        weighted = [m for m in model.main if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
        assert [m.bias is None for m in weighted] == [True] * (len(weighted) - 1) + [False]


def test_the_examples_checkpoints_load():
    """PyTorch's DCGAN example: its keys, its shapes, its numbers of parameters."""
    generator, discriminator = DCGANGenerator(), DCGANDiscriminator()
    widths = [100, 512, 256, 128, 64, 3]
    expected = {f"main.{3 * k}.weight": (a, b, 4, 4) for k, (a, b) in enumerate(itertools.pairwise(widths))}
    found = {key: tuple(p.shape) for key, p in generator.state_dict().items() if p.dim() == 4}
    assert found == expected
    assert {"main.1.running_var", "main.10.num_batches_tracked"} <= {*generator.state_dict()}
    assert sum(p.numel() for p in generator.parameters()) == 3576704
    assert sum(p.numel() for p in discriminator.parameters()) == 2765568
    convs = [key for key, p in discriminator.state_dict().items() if p.dim() == 4]
    assert convs == ["main.0.weight", "main.2.weight", "main.5.weight", "main.8.weight", "main.11.weight"]


def test_dcgan_init_is_the_authors():
    torch.manual_seed(0)
    model = dcgan_init(DCGANGenerator(width=32))
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert abs(module.weight.std().item() - 0.02) < 1e-3 and abs(module.weight.mean().item()) < 1e-3
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean().item() - 1) < 0.02 and not module.bias.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DCGANGenerator(48), r"DCGANGenerator: size: expected one of 28, 32, 64, 128, got 48"),
        (lambda: DCGANDiscriminator(60), r"DCGANDiscriminator: size.*got 60"),
        (lambda: DCGANGenerator(latent=0), r"latent: expected at least 1, got 0"),
        (lambda: DenseGeneratorK4(last_kernel=4), r"last_kernel: expected an odd number, got 4"),
        (lambda: DenseDiscriminator(30), r"size: expected a multiple of 4, got 30"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", [name for name in MODELS if "128" not in name and "256" not in name])
def test_every_named_model_takes_its_input(name):
    make, shape = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        y = model(torch.randn(2, *shape))
    assert all(torch.isfinite(part).all() for part in (y if isinstance(y, tuple) else (y,)))


def test_every_model_says_what_its_images_are():
    without_images = {"ImagePool", "GPT", "LSTMLanguageModel", "Llama", "Seq2Seq", "TextVAE", "VRNN"}
    classes = [getattr(models, name) for name in models.__all__ if name not in without_images]
    signed = {cls.__name__: cls.signed for cls in classes if isinstance(cls, type) and issubclass(cls, nn.Module)}
    assert len(signed) >= 13 and signed.pop("MLPVAE") is False and set(signed.values()) == {True}
