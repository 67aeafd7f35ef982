"""What a GAN has against collapse and instability: each option by its formula."""

import copy
import math

import pytest
import torch
from alike import assert_alike, assert_close
from torch import nn

from genai_fast import models
from genai_fast.models import GAN, WGANGP
from genai_fast.models.gan import plain
from genai_fast.models.gan.augment import diff_augment
from genai_fast.models.gan.settings import DCGANConfig, GANConfig
from genai_fast.models.registry import make
from genai_fast.training import Step, checkpoint, make_optimizer
from genai_fast.training.schedule import Schedule

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def small(**options):
    torch.manual_seed(0)
    generator = models.MLPGenerator((1, 8, 8), latent=4, widths=(8,))
    return GAN(generator, models.MLPDiscriminator((1, 8, 8), widths=(8,)), **options)


def losses(gan, x):
    """Both turns' losses of a step that updates nothing."""
    torch.manual_seed(3)
    return [loss for _, loss in gan.turns(x)]


def outputs(gan, x):
    """D's outputs at real and at generated images for the noise that `losses` draws."""
    torch.manual_seed(3)
    return gan.discriminator(x), gan.discriminator(gan.generator(torch.randn(len(x), 4)))


def test_hinge_and_least_squares_by_their_formulas():
    gan = small(loss="hinge")
    gan.discriminator.main[-1].weight.data *= 20  # outputs beyond 1 too
    real, fake = outputs(gan, X)
    assert real.abs().max() > 1 or fake.abs().max() > 1
    expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean(), -fake.mean()
    torch.testing.assert_close(losses(gan, X), list(expected))
    gan = small(loss="least-squares", smoothing=0.1)
    real, fake = outputs(gan, X)
    expected = 0.5 * (real - 0.9).square().mean() + 0.5 * fake.square().mean(), 0.5 * (fake - 1).square().mean()
    torch.testing.assert_close(losses(gan, X), list(expected))
    assert not gan.nats and small().nats
    found = Step(gan, make_optimizer(gan, GANConfig()))
    torch.manual_seed(3)
    right = ((real > 0.5).float().mean() + (fake < 0.5).float().mean()) / 2
    torch.testing.assert_close(found(X).accuracy, right)


@pytest.mark.parametrize("loss", ["hinge", "least-squares"])
def test_pix2pix_and_srgan_take_other_losses(loss):
    torch.manual_seed(0)
    score = nn.Sequential(nn.Flatten(), nn.LazyLinear(1))
    fake_of, x = nn.Conv2d(1, 1, 3, padding=1), torch.rand(3, 1, 8, 8)
    of_pairs = models.Pix2Pix(fake_of, score, l1=2.0, loss=loss)
    fake = fake_of(x)
    real, made = score(torch.cat([x, -x], 1)), score(torch.cat([x, fake], 1))
    expected = {
        "hinge": (0.5 * ((1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()), -made.mean()),
        "least-squares": (0.25 * ((real - 1).square().mean() + made.square().mean()), 0.5 * (made - 1).square().mean()),
    }[loss]
    found = [value for _, value in of_pairs.turns(x, -x)]
    torch.testing.assert_close(found, [expected[0], expected[1] + 2.0 * (fake + x).abs().mean()])

    enlarger = models.Enlarger(channels=1, width=4, blocks=1, scale=2)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    gan = models.SRGAN(enlarger, critic, adversarial=0.5, loss=loss)
    made = enlarger(gan.lower(x))
    generator_loss = {"hinge": -critic(made).mean(), "least-squares": 0.5 * (critic(made) - 1).square().mean()}[loss]
    _, found = [value for _, value in gan.turns(x)]
    torch.testing.assert_close(found, (made - x).square().mean() + 0.5 * generator_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_r1_and_its_gradients_through_fused_blocks(norm):
    """Second derivatives of convolution, batch norm and LeakyReLU, beside stock modules in float64."""
    torch.manual_seed(0)
    critic = models.DCGANDiscriminator(28, width=4, channels=1, norm=norm, attention=14)
    critic.main[2].gain.data.fill_(0.5)
    gan = GAN(models.DCGANGenerator(28, latent=4, width=2, channels=1), critic, r1=3.0)
    x = torch.rand(4, 1, 28, 28) * 2 - 1
    stock = copy.deepcopy(critic).double()
    stock.main = nn.Sequential(*stock.main)
    torch.manual_seed(3)
    fake = gan.generator(torch.randn(4, 4)).detach().double()
    real = x.double().requires_grad_()
    if norm == "batch":
        at_real, at_fake = stock(real), stock(fake)
    else:
        at_real, at_fake = stock(torch.cat([real, fake])).chunk(2)
    (slope,) = torch.autograd.grad(at_real.sum(), real, create_graph=True)
    bce = nn.functional.softplus(-at_real).mean() + nn.functional.softplus(at_fake).mean()
    (bce + 1.5 * slope.square().sum((1, 2, 3)).mean()).backward()
    gan.generator.apply(lambda m: m.reset_running_stats() if isinstance(m, nn.BatchNorm2d) else None)
    torch.manual_seed(3)
    parameters, loss = next(gan.turns(x))
    loss.backward()
    for (name, p), q in zip(critic.named_parameters(), stock.parameters(), strict=True):
        assert_close(p.grad.double(), q.grad, 1e-3, scale=max(q.grad.abs().max().item(), 1e-3), what=name)
    assert len(parameters) == len(list(stock.parameters()))


def test_r1_flattens_the_discriminator_at_the_data():
    slopes = []
    for r1 in (0.0, 100.0):
        gan = small(r1=r1)
        step = Step(gan, make_optimizer(gan, GANConfig(lr=2e-3)))
        for _ in range(60):
            step(X)
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(gan.discriminator(x).sum(), x)
        slopes.append(float(slope.square().sum() / len(x)))
    assert slopes[1] < 0.05 * slopes[0]


def test_augmentation_by_its_definition():
    torch.manual_seed(0)
    x = torch.rand(500, 3, 16, 16, dtype=torch.float64) + 1  # never 0
    moved = diff_augment(x, ("translation",))
    seen = set()
    for image, other in zip(x, moved, strict=True):
        rows, columns = ((other[0] != 0).any(side).nonzero().flatten() for side in (1, 0))
        down = int(rows[0]) or int(rows[-1]) - 15
        right = int(columns[0]) or int(columns[-1]) - 15
        shifted = torch.zeros_like(image)
        to = [slice(max(s, 0), 16 + min(s, 0)) for s in (down, right)]
        of = [slice(max(-s, 0), 16 + min(-s, 0)) for s in (down, right)]
        shifted[:, to[0], to[1]] = image[:, of[0], of[1]]
        assert torch.equal(other, shifted)
        seen |= {down, right}
    assert seen == set(range(-2, 3))

    cut = diff_augment(x, ("cutout",))
    assert torch.equal(cut[cut != 0], x[cut != 0])
    holes = (cut == 0)[:, 0].sum((1, 2))
    assert holes.max() == 64 and holes.min() >= 16 and torch.equal((cut == 0).all(1), (cut == 0).any(1))

    coloured = diff_augment(x, ("color",))
    for image, other in zip(x[:20], coloured[:20], strict=True):
        grey, other_grey = image.mean(0), other.mean(0)
        contrast = (other_grey - other.mean()) / (grey - image.mean())  # by one factor at every pixel
        saturation = ((other - other_grey) / (image - grey)) / contrast
        assert contrast.std() < 1e-6 and 0.5 <= contrast.mean() <= 1.5
        assert saturation.std() < 1e-6 and 0 <= saturation.mean() <= 2
        assert abs(other.mean() - image.mean()) <= 0.5
    y = x[:3, :, :6, :6].clone().requires_grad_()
    torch.manual_seed(1)
    state = torch.get_rng_state()

    def changed(images):
        torch.set_rng_state(state)
        return diff_augment(images, ("color", "translation", "cutout"))

    assert torch.autograd.gradcheck(changed, y) and torch.autograd.gradgradcheck(changed, y)


def test_real_and_generated_images_are_augmented_on_their_way_and_samples_are_not():
    seen = []
    gan = small(diff_augment="cutout", r1=1.0)
    gan.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for parameters, loss in gan.turns(X):
        assert all(g is not None for g in torch.autograd.grad(loss, parameters))
    both, fake = seen
    holes = [int((image == 0).sum()) >= 4 for image in (*both, *fake)]
    assert all(holes) and len(both) == 12 and len(fake) == 6
    assert int((gan.sample(6, seed=0) == 0).sum()) == 0
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    wgan = WGANGP(models.MLPGenerator((1, 8, 8), latent=4, widths=(8,)), critic, n_critic=1, diff_augment="cutout")
    shown = []
    critic.register_forward_pre_hook(lambda module, inputs: shown.append(int((inputs[0] == 0).sum())))
    for _ in wgan.turns(X):
        pass
    assert shown[0] >= 48 and shown[1] == 0 and shown[2] >= 24  # the penalty's images are whole


def test_self_attention_by_its_formula():
    torch.manual_seed(0)
    block = plain.PlainSelfAttention(16).double()
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    assert torch.equal(block(x), x)  # at first
    block.gain.data.fill_(0.7)
    q, k, v = (conv.weight[:, :, 0, 0] for conv in (block.query, block.key, block.value))
    pixels = x.flatten(2).transpose(1, 2)
    seen = torch.empty_like(pixels)
    for b in range(2):
        for j in range(12):
            scores = (pixels[b] @ k.T) @ (q @ pixels[b, j])
            seen[b, j] = block.out.weight[:, :, 0, 0] @ (v @ (scores.softmax(0) @ pixels[b]))
    expected = x + 0.7 * seen.transpose(1, 2).view_as(x)
    torch.testing.assert_close(block(x), expected)
    assert torch.autograd.gradgradcheck(block, x[:1, :, :2, :2].clone().requires_grad_())


@pytest.mark.parametrize("spectral", [False, True])
def test_networks_with_attention_are_the_plain_ones(spectral):
    torch.manual_seed(0)
    settings = {"width": 8, "channels": 1, "attention": 14}
    generator = models.DCGANGenerator(28, latent=4, **settings)
    twin = plain.PlainDCGANGenerator(28, latent=4, **settings)
    critic = models.DCGANDiscriminator(28, spectral=spectral, **settings)
    for model in (generator, critic):
        (block,) = (m for m in model.modules() if isinstance(m, plain.PlainSelfAttention))
        block.gain.data.fill_(0.5)
    twin.load_state_dict(generator.state_dict())
    z = torch.randn(3, 4)
    assert_alike(generator, twin, z, steps=2)
    if not spectral:
        other = plain.PlainDCGANDiscriminator(28, **settings)
        other.load_state_dict(critic.state_dict())
        x = torch.randn(3, 1, 28, 28)
        assert_close(critic(x).sigmoid(), other(x))
    else:
        norms = [
            torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2)
            for m in critic.modules()
            if isinstance(m, nn.Conv2d)
        ]
        assert len(norms) == 7 and all(abs(float(norm) - 1) < 0.1 for norm in norms)


def test_the_discriminators_rate_follows_its_accuracy():
    gan = small(adapt=0.8)
    optimizer = make_optimizer(gan, GANConfig(lr=1e-3, lr_discriminator=2e-3))
    schedule = Schedule(optimizer, GANConfig(), 100, gan)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-3]
    for accuracy, factor in ((1.0, math.exp(-0.01)), (1.0, math.exp(-0.02)), (0.2, 1.0)):
        schedule.after(gan_losses(accuracy))
        schedule.set(1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * factor)
        assert optimizer.param_groups[1]["lr"] == 1e-3
    for _ in range(2000):
        schedule.after(gan_losses(1.0))
    assert float(gan.rate) == pytest.approx(0.01)
    assert "rate" in gan.state_dict() and "rate" not in small().state_dict()


def gan_losses(accuracy):
    return models.GANLosses(*torch.tensor([0.0, 0.0, accuracy]))


OPTIONS = {"loss": "hinge", "r1": 1.0, "diff_augment": "color,translation,cutout", "attention": 14, "spectral": True}


def test_all_of_them_resume_bit_for_bit(tmp_path):
    config = DCGANConfig(width=4, latent=4, ema=0.9, adapt=0.1, **OPTIONS)
    x = torch.rand(8, 1, 28, 28) * 2 - 1

    def begun():
        torch.manual_seed(0)
        gan = make("dcgan", config, (1, 28, 28), 0)
        optimizer = make_optimizer(gan, config)
        return gan, optimizer

    def run(gan, optimizer, first, last):
        step, schedule = Step(gan, optimizer), Schedule(optimizer, config, 10, gan)
        for number in range(first, last):
            schedule.set(number)
            schedule.after(step(x))

    gan, optimizer = begun()
    run(gan, optimizer, 0, 3)
    checkpoint.save(tmp_path, gan, optimizer, 3, {}, {})
    run(gan, optimizer, 3, 5)
    assert float(gan.rate) != 1 and all(p.isfinite().all() for p in gan.parameters())
    again, optimizer = begun()
    checkpoint.restore(checkpoint.latest(tmp_path), again, optimizer)
    run(again, optimizer, 3, 5)
    assert all(map(torch.equal, again.state_dict().values(), gan.state_dict().values()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(loss="wasserstein"), "loss: expected one of cross-entropy, hinge, least-squares, got 'wass"),
        (lambda: small(loss="hinge", smoothing=0.1), "smoothing: expected 0 with the hinge loss"),
        (lambda: small(r1=-1.0), "r1: expected at least 0, got -1"),
        (lambda: small(adapt=1.0), "adapt: expected 0 <= adapt < 1, got 1"),
        (lambda: small(diff_augment="color,zoom"), "diff_augment: expected some of color, .* got 'zoom'"),
        (lambda: models.DCGANGenerator(28, attention=28), "attention: expected 0 or .* 7, 14, got 28"),
        (lambda: models.DCGANDiscriminator(64, attention=5), "attention: expected 0 or .* 4, 8, 16, 32, got 5"),
    ],
)
def test_options_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
