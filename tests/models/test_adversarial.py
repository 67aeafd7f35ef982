"""GANs in turns: as the plain loop that everyone writes, and each option by its formula."""

import copy
import math

import pytest
import torch
from torch import nn

from genai_fast import models
from genai_fast.models import GAN, WGANGP
from genai_fast.models.gan import plain as scripts
from genai_fast.models.gan.settings import DCGANConfig, GANConfig
from genai_fast.models.registry import make
from genai_fast.training import Step, make_optimizer

STEPS = 50
SHAKEN = 3  # runs of a script whose weights were off by rounding: one alone may hardly stray, or begin too late
LEAD = 5  # steps by which ours may begin before them


def pairs():
    """Name -> (generator, discriminator) of ours, of the plain script, and an image's shape."""
    torch.manual_seed(0)
    ours = (models.DCGANGenerator(64, width=4, latent=16), models.DCGANDiscriminator(64, width=4))
    ours = tuple(map(models.dcgan_init, ours))
    theirs = scripts.PlainDCGANGenerator(latent=16, width=4), scripts.PlainDCGANDiscriminator(width=4)
    yield "dcgan", ours, theirs, (3, 64, 64)
    widths = (32, 48)
    ours = models.MLPGenerator((1, 8, 8), latent=16, widths=widths), models.MLPDiscriminator((1, 8, 8), widths=widths)
    theirs = (scripts.PlainMLPGenerator((1, 8, 8), 16, widths), scripts.PlainMLPDiscriminator((1, 8, 8), widths))
    yield "mlp", ours, theirs, (1, 8, 8)
    ours = models.DenseGenerator(16, side=2), models.DenseDiscriminator(8, dropout=0.0)
    theirs = scripts.PlainDenseGenerator(16, side=2), scripts.PlainDenseDiscriminator(8, dropout=0.0)
    yield "dense", ours, theirs, (1, 8, 8)


def losses_of(step, data):
    torch.manual_seed(1)
    return torch.stack([torch.stack(tuple(step(x))[:2]) for x in data])


@pytest.mark.parametrize("pair", list(pairs()), ids=lambda p: p[0])
def test_fifty_steps_are_those_of_the_plain_script(pair):
    """Within what rounding does to the plain script itself: Adam makes whole steps of gradients that are only that."""
    _, ours, theirs, shape = pair
    for mine, other in zip(ours, theirs, strict=True):
        other.load_state_dict(mine.state_dict())
    torch.manual_seed(2)
    rounded = [copy.deepcopy(theirs) for _ in range(SHAKEN)]
    for p in (p for networks in rounded for network in networks for p in network.parameters()):
        p.data *= 1 + 2**-23 * torch.randn(p.shape)
    data = torch.rand(STEPS, 16, *shape) * 2 - 1
    plain, *shaken = (losses_of(scripts.gan_step(g, d, 16), data) for g, d in (theirs, *rounded))
    gan = GAN(*ours)
    got = losses_of(Step(gan, make_optimizer(gan, GANConfig())), data)
    noise = (torch.stack(shaken) - plain).abs().amax(0).cummax(0).values + 1e-5
    noise = torch.cat([noise[LEAD:], noise[-1:].expand(LEAD, -1)])
    assert ((got - plain).abs() <= 10 * noise).all(), ((got - plain).abs() / noise).max()
    assert (plain - plain[0]).abs().max() > 3 * (got - plain).abs().max()  # it learned by more


def small(**options):
    torch.manual_seed(0)
    generator = models.MLPGenerator((1, 8, 8), latent=4, widths=(8,))
    discriminator = models.MLPDiscriminator((1, 8, 8), widths=(8,))
    return GAN(generator, discriminator, **options)


def convolutional():
    torch.manual_seed(0)
    size = {"width": 4, "channels": 1}
    return GAN(models.DCGANGenerator(28, latent=4, **size), models.DCGANDiscriminator(28, **size))


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def test_a_turn_changes_its_own_network_and_makes_no_other_gradients():
    gan, x = small(), torch.rand(6, 1, 8, 8) * 2 - 1
    turns = gan.turns(x)
    for trained, other in (("discriminator", "generator"), ("generator", "discriminator")):
        parameters, loss = next(turns)
        assert [id(p) for p in parameters] == [id(p) for p in getattr(gan, trained).parameters()]
        gan.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
        assert all(p.grad is None for p in getattr(gan, other).parameters())
        assert all(p.requires_grad for p in gan.parameters())
    with pytest.raises(StopIteration) as end:
        next(turns)
    assert 0 <= float(end.value.value.accuracy) <= 1

    before = weights(gan.generator), weights(gan.discriminator)
    optimizer = make_optimizer(gan, GANConfig(lr=1e-2, lr_discriminator=1e-3))
    Step(gan, optimizer)(x)
    moved = [
        max(float((a - b).abs().max()) for a, b in zip(old, network.parameters(), strict=True))
        for old, network in zip(before, (gan.generator, gan.discriminator), strict=True)
    ]
    assert moved == pytest.approx([1e-2, 1e-3], rel=0.01)  # Adam's first step is as long as its rate
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}  # each network was updated once


def test_smoothing_and_accuracy_by_their_formulas():
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    gan = small(smoothing=0.1)
    torch.manual_seed(3)
    _, loss = next(gan.turns(x))
    torch.manual_seed(3)
    fake = gan.generator(torch.randn(6, 4))
    real, generated = gan.discriminator(x).sigmoid(), gan.discriminator(fake).sigmoid()
    expected = -(0.9 * real.log() + 0.1 * (1 - real).log()).mean() - (1 - generated).log().mean()
    torch.testing.assert_close(loss, expected)
    torch.manual_seed(3)
    losses = Step(gan, make_optimizer(gan, GANConfig()))(x)
    right = ((real > 0.5).float().mean() + (generated < 0.5).float().mean()) / 2
    torch.testing.assert_close(losses.accuracy, right)


def test_the_average_follows_the_generator_and_draws_the_samples():
    gan, x = small(ema=0.9), torch.rand(6, 1, 8, 8)
    expected = weights(gan.generator)
    step = Step(gan, make_optimizer(gan, GANConfig(lr=1e-2)))
    for _ in range(3):
        step(x)
        expected = [0.9 * a + 0.1 * b for a, b in zip(expected, weights(gan.generator), strict=True)]
    for a, b in zip(gan.average.parameters(), expected, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(gan.sample(5, seed=7), gan.average(z)) and gan.sampler is gan.average
    assert not torch.equal(gan.sample(5, seed=7), gan.generator(z))


def dcgan():
    small = {"width": 4, "channels": 1}
    return GAN(models.DCGANGenerator(28, latent=4, **small), models.DCGANDiscriminator(28, **small))


def test_batch_statistics_of_real_and_generated_images_are_kept_apart():
    torch.manual_seed(0)
    gan = dcgan()
    norm = next(m for m in gan.discriminator.modules() if isinstance(m, nn.BatchNorm2d))
    next(gan.turns(torch.zeros(4, 1, 28, 28)))
    assert int(norm.num_batches_tracked) == 2


def test_sampling_runs_in_evaluation_and_leaves_training():
    gan = dcgan()
    one = gan.sample(3, seed=1)[:1]
    assert torch.equal(gan.sample(1, seed=1), one) is False or one.shape == (1, 1, 28, 28)
    assert gan.training and gan.generator.training
    z = torch.randn(3, 4)
    torch.testing.assert_close(gan.decode(z)[:1], gan.decode(z[:1]))  # no statistics of the batch


def test_a_conditional_pair_learns_its_labels():
    torch.manual_seed(0)
    small = {"width": 4, "channels": 1}
    generator = models.ConditionalGenerator(3, 28, latent=4, **small)
    gan = GAN(generator, models.ConditionalDiscriminator(3, 28, **small), classes=3)
    step = Step(gan, make_optimizer(gan, GANConfig()))
    x, labels = torch.rand(6, 1, 28, 28), torch.arange(6) % 3
    before = [copy.deepcopy(n.embed.weight) for n in (gan.generator, gan.discriminator)]
    step(x, labels)
    for old, network in zip(before, (gan.generator, gan.discriminator), strict=True):
        assert not torch.equal(old, network.embed.weight)
    assert gan.sample(4, seed=1).shape == (4, 1, 28, 28)
    turn = torch.tensor([0, 1, 2, 0])
    assert torch.equal(gan.sample(4, seed=1), gan.sample(4, seed=1, labels=turn))
    assert not torch.equal(gan.sample(4, seed=1), gan.sample(4, seed=1, labels=turn.flip(0)))


def critic():
    """Smooth, so that second derivatives are not all zero."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


@pytest.mark.parametrize("n_critic", [1, 3])
def test_wgan_gp_by_its_formula(n_critic):
    torch.manual_seed(0)
    generator = models.MLPGenerator((1, 8, 8), latent=4, widths=(8,))
    gan = WGANGP(generator, critic(), n_critic=n_critic, penalty=7.0).double()
    x = torch.rand(4 * n_critic, 1, 8, 8, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(5)
        turns = gan.turns(x)
        found = []
        for _ in range(n_critic):
            parameters, loss = next(turns)
            found.append((loss, torch.autograd.grad(loss, parameters, retain_graph=True)))
        generator_parameters, generator_loss = next(turns)
        torch.manual_seed(5)
        for (loss, gradients), real in zip(found, x.chunk(n_critic), strict=True):
            fake = gan.generator(torch.randn(4, 4)).detach()
            share = torch.rand(4, 1, 1, 1)
            between = (fake + share * (real - fake)).requires_grad_()
            (slope,) = torch.autograd.grad(gan.discriminator(between).sum(), between, create_graph=True)
            penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
            expected = gan.discriminator(fake).mean() - gan.discriminator(real).mean() + 7.0 * penalty
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(gan.discriminator.parameters())))
        torch.testing.assert_close(generator_loss, -gan.discriminator(gan.generator(torch.randn(4, 4))).mean())
    finally:
        torch.set_default_dtype(torch.float32)
    assert generator_parameters[0] is next(gan.generator.parameters())


def test_wgan_gp_brings_a_critics_slope_to_one():
    torch.manual_seed(0)
    gan = WGANGP(models.MLPGenerator((1, 8, 8), latent=4, widths=(8,)), critic(), n_critic=2)
    step = Step(gan, make_optimizer(gan, GANConfig(lr=2e-3)))
    x = torch.rand(32, 1, 8, 8)

    def slope():
        between = (0.5 * x[:16] + 0.5 * gan.sample(16, seed=1)).requires_grad_()
        (gradient,) = torch.autograd.grad(gan.discriminator(between).sum(), between)
        return float(gradient.flatten(1).norm(dim=1).mean())

    before = slope()
    for _ in range(150):
        step(x)
    assert abs(slope() - 1) < 0.15 < abs(before - 1)


MISTAKES = {
    "smoothing": (lambda: small(smoothing=1.0), "GAN: smoothing: expected 0 <= smoothing < 1, got 1.0"),
    "ema": (lambda: small(ema=-0.1), "GAN: ema: expected 0 <= ema < 1"),
    "critic": (
        lambda: WGANGP(models.DCGANGenerator(28), models.DCGANDiscriminator(28)),
        "expected a critic without batch norm.*remedy: instance norm",
    ),
    "n_critic": (lambda: WGANGP(models.MLPGenerator(), models.MLPDiscriminator(), n_critic=0), "n_critic >= 1"),
    "share": (
        lambda: next(WGANGP(models.MLPGenerator(), models.MLPDiscriminator()).turns(torch.rand(7, 1, 28, 28))),
        "expected a multiple of n_critic=5 images, got 7",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_turn_that_is_not_finite_is_skipped_alone():
    gan, x = small(), torch.rand(6, 1, 8, 8) * 2 - 1
    step = Step(gan, make_optimizer(gan, GANConfig()))
    step(x)
    before = weights(gan.discriminator), weights(gan.generator)
    for row in (1, 2):
        step(torch.full_like(x, math.nan))
        assert step.skipped() == (row, row)
    assert all(map(torch.equal, before[0], weights(gan.discriminator)))
    assert not all(map(torch.equal, before[1], weights(gan.generator)))  # its turn sees no data
    step(x)
    assert step.skipped() == (2, 0) and all(p.isfinite().all() for p in gan.parameters())


def test_bfloat16_trains():
    gan = make("dcgan", DCGANConfig(width=8, latent=8), (1, 28, 28), 0)
    step = Step(gan, make_optimizer(gan, DCGANConfig()), precision="bfloat16")
    x = torch.rand(8, 1, 28, 28) * 2 - 1
    losses = [step(x) for _ in range(5)]
    assert all(math.isfinite(float(v)) for v in losses[-1]) and step.skipped() == (0, 0)
    assert all(p.dtype is torch.float32 for p in gan.parameters())
    assert float(losses[-1].discriminator) < float(losses[0].discriminator)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_pair_takes_the_steps_of_a_plain_one_and_skips_what_is_not_finite():
    x = (torch.rand(16, 1, 8, 8) * 2 - 1).cuda()
    results = []
    for graph in (False, True):
        gan = small(ema=0.9).cuda()
        step = Step(gan, make_optimizer(gan, GANConfig(lr=1e-3)), graph=graph)
        torch.manual_seed(1)
        results.append(torch.stack([torch.stack(tuple(step(x))) for _ in range(30)]))
        assert step.captured == graph
    # The generator's state differs after a capture, so noise differs: the course is compared, not each number.
    plain, captured = (losses[-10:, :2].mean(0) for losses in results)
    torch.testing.assert_close(captured, plain, rtol=0.2, atol=0.05)
    before = weights(gan.discriminator)
    step(torch.full_like(x, math.nan))
    assert step.skipped() == (1, 1)  # the discriminator's turn; the generator's sees no data
    assert all(map(torch.equal, before, weights(gan.discriminator)))
    step(x)
    assert step.skipped() == (1, 0) and all(p.isfinite().all() for p in gan.parameters())
