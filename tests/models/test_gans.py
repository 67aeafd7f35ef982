"""MLP and conditional GANs' networks, and critics: what they compute, what is differentiable twice, what is refused."""

import copy

import pytest
import torch
from alike import assert_alike, assert_close, assert_gradients
from torch import nn
from torch.nn.utils import parametrize

from genai_fast.models.gan.dcgan import ConditionalDiscriminator, ConditionalGenerator, DCGANDiscriminator, dcgan_init
from genai_fast.models.gan.dense import MLPDiscriminator, MLPGenerator

SHAPE, CLASSES = (3, 28, 28), 4


class Labelled(nn.Module):
    """A model of two inputs as one of the first alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.labels = model, torch.tensor([3, 0, 0])

    def forward(self, x):
        return self.model(x, self.labels)


def plain(model):
    """The same on stock modules."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if "main" in module._modules:
            module.main = nn.Sequential(*module.main)
    return model


def _critic(**settings):
    return DCGANDiscriminator(28, width=4, **settings)


# What makes a network, the shapes of its input and of what it makes, without the batch.
NETWORKS = {
    "mlp-generator": (lambda: MLPGenerator(SHAPE, latent=5, widths=(6, 9)), (5,), SHAPE),
    "mlp-discriminator": (lambda: MLPDiscriminator(SHAPE, widths=(9, 6)), SHAPE, ()),
    "conditional-generator": (
        lambda: Labelled(ConditionalGenerator(CLASSES, 28, latent=5, width=4, embedding=3)),
        (5,),
        SHAPE,
    ),
    "conditional-discriminator": (lambda: Labelled(ConditionalDiscriminator(CLASSES, 28, width=4)), SHAPE, ()),
    "conditional-critic": (
        lambda: Labelled(ConditionalDiscriminator(CLASSES, 28, width=4, norm="instance")),
        SHAPE,
        (),
    ),
    "critic-instance": (lambda: _critic(norm="instance"), SHAPE, ()),
    "critic-none": (lambda: _critic(norm="none"), SHAPE, ()),
    "critic-spectral": (lambda: _critic(norm="none", spectral=True), SHAPE, ()),
    "discriminator-spectral": (lambda: _critic(spectral=True), SHAPE, ()),
}
CRITICS = [name for name in NETWORKS if "critic" in name or name == "mlp-discriminator"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_the_same_as_stock_modules(name):
    make, given, made = NETWORKS[name]
    model, x = make(), torch.randn(3, *given)
    y = model(x)
    assert y.shape == (3, *made)
    if made:
        assert y.abs().max() <= 1
    assert_alike(model, plain(model), x, steps=2)
    if x.dim() == 4:
        assert_alike(model, plain(model), x.contiguous(memory_format=torch.channels_last), steps=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_under_autocast_all_is_finite(name):
    make, given, _ = NETWORKS[name]
    model, x = make(), torch.randn(3, *given, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype is torch.bfloat16 and y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *model.parameters()))


def _penalty(critic, x):
    """Gulrajani et al.: the mean of (|grad of the score| - 1)^2."""
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("name", CRITICS)
def test_the_gradients_of_a_gradient_penalty(name):
    make, given, _ = NETWORKS[name]
    model, x = make().eval(), torch.randn(3, *given)  # in evaluation spectral norm holds its vectors
    truth = plain(model).double()
    found, expected = {}, {}
    for critic, grads, images in ((model, found, x), (truth, expected, x.double())):
        images = images.requires_grad_()
        loss = _penalty(critic, images)
        loss.backward()
        grads.update({key: p.grad for key, p in critic.named_parameters() if p.grad is not None})
        grads["x"] = images.grad
    assert [*found] == [*expected] and len(found) > 3
    assert_gradients(found, expected)


def test_an_instance_normed_score_is_of_its_sample_alone():
    x = torch.randn(4, *SHAPE)
    for norm, alone in (("instance", True), ("none", True), ("batch", False)):
        critic = _critic(norm=norm)
        assert torch.allclose(critic(x)[:1], critic(x[:1]), atol=1e-5) is alone, norm


def test_norms_are_where_they_are_said_to_be():
    kinds = {norm: [type(m).__name__ for m in _critic(norm=norm).main] for norm in ("batch", "instance", "none")}
    assert kinds["instance"] == [kind.replace("BatchNorm2d", "InstanceNorm2d") for kind in kinds["batch"]]
    assert kinds["none"] == [kind for kind in kinds["batch"] if kind != "BatchNorm2d"]
    assert all(m.affine and not m.track_running_stats for m in _critic(norm="instance").main if hasattr(m, "affine"))
    assert [m.bias is not None for m in _critic(norm="none").main if isinstance(m, nn.Conv2d)] == [True, True, False]


def test_spectral_norm_divides_by_the_largest_singular_value():
    model = dcgan_init(_critic(spectral=True))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 3 and all(parametrize.is_parametrized(m, "weight") for m in convs)
    x = torch.randn(2, *SHAPE)
    for _ in range(20):
        model(x)
    for conv in convs:
        assert abs(conv.parametrizations.weight.original.std().item() - 0.02) < 0.004
        assert abs(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2).item() - 1) < 0.02


def test_dcgan_init_renews_the_vectors_of_spectral_norm():
    model = _critic(spectral=True).eval()
    dcgan_init(model)
    assert not model.training
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        assert 0.9 < torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2).item() < 1.2


def test_mlps_are_initialised_as_linear_is_and_have_the_known_sizes():
    generator, discriminator = MLPGenerator(), MLPDiscriminator(dropout=0.3)
    sizes = [(m.in_features, m.out_features) for m in generator.main if isinstance(m, nn.Linear)]
    assert sizes == [(100, 256), (256, 512), (512, 1024), (1024, 784)]
    sizes = [(m.in_features, m.out_features) for m in discriminator.main if isinstance(m, nn.Linear)]
    assert sizes == [(784, 1024), (1024, 512), (512, 256), (256, 1)]
    for m in (*generator.main, *discriminator.main):
        if isinstance(m, nn.Linear):
            bound = m.in_features**-0.5
            assert m.weight.abs().max() <= bound and m.bias.abs().max() <= bound
            if m.out_features > 1:
                assert abs(m.weight.std().item() * 3**0.5 / bound - 1) < 0.02


def test_dropout_is_after_every_activation_and_only_in_training():
    model = MLPDiscriminator(SHAPE, widths=(8, 8), dropout=0.5)
    assert [type(m).__name__ for m in model.main] == ["Linear", "LeakyReLU", "Dropout"] * 2 + ["Linear"]
    x = torch.randn(3, *SHAPE)
    assert not torch.equal(model(x), model(x))
    assert_close(model.eval()(x), plain(model)(x))


def test_a_label_changes_its_own_sample_alone():
    z, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    other = torch.tensor([0, 3, 2])
    generator = ConditionalGenerator(CLASSES, 28, latent=5, width=4, embedding=3).eval()
    discriminator = ConditionalDiscriminator(CLASSES, 28, width=4).eval()
    with torch.no_grad():
        images = generator(z, labels)
        logits = (discriminator(images, other), discriminator(images, labels))
        for found, expected in ((generator(z[..., None, None], other), images), logits):
            same = (found - expected).flatten(1).abs().amax(1) < 1e-6 if found.dim() > 1 else found == expected
            assert same.tolist() == [True, False, True]


def test_a_labelled_batch_maps():
    """The check of labels' range looks at no values where a transform would see it."""
    model = ConditionalDiscriminator(CLASSES, 28, width=4, norm="none")
    x, labels = torch.randn(3, *SHAPE), torch.tensor([0, 1, 2])
    alone = torch.func.vmap(lambda image, label: model(image[None], label[None])[0])
    assert_close(alone(x, labels), model(x, labels))


@pytest.mark.parametrize("owner", ["ConditionalGenerator", "ConditionalDiscriminator"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), r"labels: expected int64, got torch.int32; convert them with .long\(\)"),
        (torch.zeros(3), r"labels: expected int64, got torch.float32"),
        (torch.zeros(2, dtype=torch.long), r"labels: expected shape \(3,\).*got \(2,\)"),
        (torch.zeros(3, CLASSES, dtype=torch.long), r"labels: expected shape \(3,\).*got \(3, 4\); one-hot"),
        (torch.tensor([0, CLASSES, 1]), r"labels: expected 0 to 3, got 4; remedy: another classes="),
        (torch.tensor([0, 1, -1]), r"labels: expected 0 to 3, got -1"),
    ],
)
def test_labels_that_do_not_fit_are_named(owner, labels, message):
    make, x = {
        "ConditionalGenerator": (ConditionalGenerator, torch.zeros(3, 5)),
        "ConditionalDiscriminator": (ConditionalDiscriminator, torch.zeros(3, *SHAPE)),
    }[owner]
    model = make(CLASSES, 28, width=1, **({"latent": 5} if make is ConditionalGenerator else {}))
    with pytest.raises(ValueError, match=f"{owner}: {message}"):
        model(x, labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPGenerator((28, 28)), r"MLPGenerator: shape: expected \(channels, height, width\).*got \(28, 28\)"),
        (lambda: MLPGenerator(latent=0), r"MLPGenerator: latent: expected at least 1, got 0"),
        (lambda: MLPDiscriminator(widths=()), r"MLPDiscriminator: widths: expected at least 1, got 0"),
        (lambda: MLPDiscriminator()(torch.zeros(2, 3, 28, 28)), r"images \[B, 1, 28, 28\], got \(2, 3, 28, 28\)"),
        (lambda: DCGANDiscriminator(norm="layer"), r"norm: expected one of 'batch', 'instance', 'none', got 'layer'"),
        (lambda: ConditionalGenerator(0), r"ConditionalGenerator: classes: expected at least 1, got 0"),
        (lambda: ConditionalGenerator(size=30), r"ConditionalGenerator: size: expected one of 28, 32.*got 30"),
        (lambda: ConditionalDiscriminator(size=30), r"ConditionalDiscriminator: size.*got 30"),
        (
            lambda: ConditionalDiscriminator(size=28)(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)),
            r"ConditionalDiscriminator: expected images \[B, 3, 28, 28\], got \(2, 3, 32, 32\)",
        ),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with torch.device("cpu"), pytest.raises(ValueError, match=message):
        make()
