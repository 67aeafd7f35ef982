"""CycleGAN and pix2pix: the losses by their formulas, the history pool, networks, batches of two sets, figures."""

import math

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from torch import nn

from genai_fast.layers import InstanceNormAct
from genai_fast.models import CycleGAN, ImagePool, PatchCritic, Pix2Pix, ResNetGenerator, UNetGenerator
from genai_fast.models.registry import make
from genai_fast.models.translation import plain
from genai_fast.models.translation.settings import CycleGANConfig, Pix2PixConfig
from genai_fast.training import Step, checkpoint, make_optimizer

SHAPE = (3, 32, 32)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def cyclegan(**settings):
    return make("cyclegan", CycleGANConfig(width=4, blocks=1, **settings), SHAPE, 0)


def numbered(first, count):
    """Images whose pixels are their numbers."""
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


def test_a_pool_gives_back_what_it_is_given_until_it_is_full():
    pool = ImagePool(6, (1, 2, 2))
    for first in (1, 4):
        assert torch.equal(pool(numbered(first, 3)), numbered(first, 3))
    assert torch.equal(pool.images[:6], numbered(1, 6)) and int(pool.count) == 6


def test_a_full_pool_gives_back_old_images_half_the_time_and_keeps_what_replaces_them():
    pool, given, new = ImagePool(6, (1, 2, 2)), [], 7
    pool(numbered(1, 6))
    for _ in range(200):
        before = set(pool.images[:6, 0, 0, 0].tolist())
        x = numbered(new, 2)
        got = pool(x)[:, 0, 0, 0].tolist()
        swapped = [k for k in range(2) if got[k] != new + k]
        assert {got[k] for k in swapped} <= before and len(set(got)) == 2
        expected = (before - {got[k] for k in swapped}) | {new + k for k in swapped}
        assert set(pool.images[:6, 0, 0, 0].tolist()) == expected  # each image is in it once
        given.append(len(swapped))
        new += 2
    assert 0.4 < sum(given) / 400 < 0.6 and int(pool.count) == 6


@pytest.mark.parametrize("count", [4, 5])
def test_a_batch_that_fills_a_pool_or_is_larger(count):
    """Nothing is exchanged before the pool was full; of a batch larger than the pool the others are given back."""
    pool = ImagePool(3, (1, 2, 2))
    assert torch.equal(pool(numbered(1, count)), numbered(1, count))
    assert torch.equal(pool.images[:3], numbered(1, 3))
    for first in range(10, 210, 10):
        got = pool(numbered(first, count))
        assert torch.equal(got[3:], numbered(first + 3, count - 3)) and len(set(got[:3, 0, 0, 0].tolist())) == 3


def test_a_pool_that_keeps_nothing_and_mistakes():
    pool, x = ImagePool(0, (1, 2, 2)), numbered(1, 3)
    assert pool(x) is x
    ImagePool(0, (1, 2, 2)).load_carried(pool.carried())
    with pytest.raises(ValueError, match="size: expected at least 0, got -1"):
        ImagePool(-1, (1, 2, 2))
    with pytest.raises(ValueError, match=r"ImagePool: expected images \[B, 1, 2, 2\], got \(3, 1, 4, 4\)"):
        ImagePool(2, (1, 2, 2))(torch.zeros(3, 1, 4, 4))
    for state, got in (({}, "nothing"), (ImagePool(3, (1, 2, 2)).carried(), r"\(3, 1, 1, 2, 2\) and \(1, 1\)")):
        with pytest.raises(ValueError, match=f"expected images \\[2, N, ...\\] and counts \\[1, N\\], got {got}"):
            ImagePool(2, (1, 2, 2)).load_carried(state)


def test_a_pool_is_carried():
    pool, again = ImagePool(4, (1, 2, 2)), ImagePool(4, (1, 2, 2))
    for first in range(1, 9, 2):
        pool(numbered(first, 2))
    again.load_carried(pool.carried())
    torch.manual_seed(1)
    expected = [pool(numbered(first, 2)) for first in (20, 22)]
    torch.manual_seed(1)
    assert all(torch.equal(again(numbered(first, 2)), x) for first, x in zip((20, 22), expected, strict=True))
    joined = {name: torch.cat([x, x * 0], 1) for name, x in pool.carried().items()}  # of two processes
    again.load_carried(joined)
    assert torch.equal(again.images[:4], pool.images[:4]) and int(again.count) == 4 and not pool.state_dict()
    again.load_carried({name: x.tensor_split(2, 1)[1] for name, x in pool.carried().items()})  # one was alone before
    assert int(again.count) == 0


def test_a_step_that_is_not_finite_leaves_the_pool(monkeypatch):
    gan, x = cyclegan(pool=3), torch.rand(2, *SHAPE) * 2 - 1
    step = Step(gan, make_optimizer(gan, CycleGANConfig()))
    step(x, x)
    before = gan.carried()
    step(torch.full_like(x, math.nan), x)
    assert step.skipped()[0] and all(map(torch.equal, before.values(), gan.carried().values()))
    step(x, x)
    assert int(gan.pool_b.count) == 3 and gan.pool_b.images.isfinite().all()


@pytest.mark.parametrize("identity", [0.0, 5.0])
def test_cyclegan_by_its_formula(identity):
    gan = cyclegan(identity=identity, cycle=7.0, pool=0)
    a, b = (torch.rand(2, *SHAPE) * 2 - 1 for _ in range(2))
    g, f, d_b, d_a = gan.networks().values()
    fake_b, fake_a = g(a), f(b)
    expected = (d_b(fake_b) - 1).square().mean() + (d_a(fake_a) - 1).square().mean()
    cycle = F.l1_loss(f(fake_b), a) + F.l1_loss(g(fake_a), b)
    own = F.l1_loss(g(b), b) + F.l1_loss(f(a), a)
    turns = gan.turns(a, b)
    parameters, loss = next(turns)
    assert [id(p) for p in parameters] == [id(p) for n in (g, f) for p in n.parameters()]
    assert_close(loss, (expected + 7.0 * cycle + identity * own), 1e-5)
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    wanted = torch.autograd.grad(expected + 7.0 * cycle + identity * own, parameters)
    largest = max(float(y.abs().max()) for y in wanted)  # a bias before a norm has a gradient of rounding errors alone
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).abs().max() <= 1e-3 * y.abs().max() + 1e-5 * largest
    parameters, loss = next(turns)
    assert [id(p) for p in parameters] == [id(p) for n in (d_b, d_a) for p in n.parameters()]
    with torch.no_grad():
        pairs = ((d_b, b, fake_b), (d_a, a, fake_a))
        expected = sum(0.5 * (d(x) - 1).square().mean() + 0.5 * d(fake).square().mean() for d, x, fake in pairs)
    assert_close(loss, expected, 1e-5)
    with pytest.raises(StopIteration) as end:
        next(turns)
    assert_close(end.value.value.cycle, cycle, 1e-5)
    assert_close(end.value.value.identity, own if identity else torch.zeros(()), 1e-5)


def test_pix2pix_by_its_formula():
    gan = make("pix2pix", Pix2PixConfig(width=4, dropout=0.0, l1=30.0), SHAPE, 0)
    a, b = (torch.rand(2, *SHAPE) * 2 - 1 for _ in range(2))
    critic, g = gan.networks().values()
    with torch.no_grad():
        made, pair = g(a), torch.cat([a, b], 1)
        real, fake = critic(pair).sigmoid(), critic(torch.cat([a, made], 1)).sigmoid()
        expected = -0.5 * real.log().mean() - 0.5 * (1 - fake).log().mean()
        wanted = -fake.log().mean() + 30.0 * (made - b).abs().mean()
    turns = gan.turns(a, b)
    parameters, loss = next(turns)
    assert parameters[0] is next(critic.parameters())
    assert_close(loss, expected, 1e-5)
    parameters, loss = next(turns)
    assert parameters[0] is next(g.parameters())
    assert_close(loss, wanted, 1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_it_resumes_with_its_pools(tmp_path, full):
    config = CycleGANConfig(width=4, blocks=1, pool=4 if full else 50)
    data = [tuple(torch.rand(2, *SHAPE) * 2 - 1 for _ in range(2)) for _ in range(6)]
    gan = make("cyclegan", config, SHAPE, 0)
    optimizer = make_optimizer(gan, config)
    step = Step(gan, optimizer)
    for batch in data[:4]:
        step(*batch)
    checkpoint.save(tmp_path, gan, optimizer, 4, {}, {})
    expected = [step(*batch) for batch in data[4:]]
    again = make("cyclegan", config, SHAPE, 0)
    optimizer = make_optimizer(again, config)
    checkpoint.restore(checkpoint.latest(tmp_path), again, optimizer)
    step = Step(again, optimizer)
    for batch, losses in zip(data[4:], expected, strict=True):
        assert all(map(torch.equal, step(*batch), losses))
    assert all(map(torch.equal, again.state_dict().values(), gan.state_dict().values()))
    assert all(map(torch.equal, again.carried().values(), gan.carried().values()))
    other = make("cyclegan", CycleGANConfig(width=4, blocks=1, pool=7), SHAPE, 0)
    with pytest.raises(checkpoint.CheckpointError, match="load_carried: expected images"):
        checkpoint.restore(checkpoint.latest(tmp_path), other, make_optimizer(other, config))


NETWORKS = {
    "resnet": (lambda: ResNetGenerator(3, width=4, blocks=2), lambda: plain.PlainResNetGenerator(3, 4, 2)),
    "u-net": (
        lambda: UNetGenerator(32, channels=3, width=4, dropout=0.0),
        lambda: plain.PlainUNetGenerator(32, 3, 4, 0.0),
    ),
    "critic": (lambda: PatchCritic(3, width=4), lambda: plain.PlainPatchCritic(3, 4)),
    "affine critic": (
        lambda: PatchCritic(3, width=4, critic_layers=2, affine=True),
        lambda: plain.PlainPatchCritic(3, 4, 2, True),
    ),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_those_of_plain_pytorch(name, layout):
    ours, twin = (build() for build in NETWORKS[name])
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(2, *SHAPE).contiguous(memory_format=layout)
    x = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    y, expected = ours(x[0]), twin(x[1])
    assert_close(y, expected, 1e-4)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    # A bias before a norm has a gradient of rounding errors alone.
    largest = max(float(p.grad.abs().max()) for p in twin.parameters())
    for (key, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-3 * float(q.grad.abs().max()) + 1e-5 * largest, key
    assert_close(x[0].grad, x[1].grad, 1e-3)


def test_keys_are_those_of_the_authors_checkpoints():
    def layers(network):
        return [key.removesuffix(".weight") for key in network.state_dict() if key.endswith(".weight")]

    blocks = [f"model.{k}.conv_block.{n}" for k in range(10, 19) for n in (1, 5)]
    expected = ["model.1", "model.4", "model.7", *blocks, "model.19", "model.22", "model.26"]
    with torch.device("meta"):
        assert layers(ResNetGenerator()) == expected
        assert layers(PatchCritic()) == [f"model.{k}" for k in (0, 2, 5, 8, 11)]
        assert sum(p.numel() for p in ResNetGenerator().parameters()) == 11_378_179  # as their program prints
        assert sum(p.numel() for p in PatchCritic().parameters()) == 2_764_737


def test_a_patch_of_a_critic_has_its_size():
    for layers, side in ((3, 70), (2, 34), (1, 16)):
        critic = PatchCritic(1, width=2, critic_layers=layers).eval()
        for m in critic.modules():  # so that nothing but convolutions joins pixels
            if isinstance(m, InstanceNormAct):
                m.forward = lambda x: x
        x = torch.randn(1, 1, 128, 128, requires_grad=True)
        judged = critic(x)
        (grad,) = torch.autograd.grad(judged[0, 0, judged.shape[2] // 2, judged.shape[3] // 2], x)
        seen = grad[0, 0].nonzero()
        assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [side, side]


def test_u_nets_go_down_as_far_as_sides_are_even():
    for size, depth, dropouts in ((28, 2, 0), (32, 5, 0), (96, 5, 0), (128, 7, 2), (256, 8, 3), (512, 8, 3)):
        net = UNetGenerator(size, width=1, channels=1)
        assert len(net.down) == depth and len(net.up) == depth - 1
        assert sum(isinstance(m, nn.Dropout) for m in net.up.modules()) == dropouts
        if size <= 96:
            assert net(torch.zeros(2, 1, size, size)).shape == (2, 1, size, size)


def test_no_image_of_a_batch_depends_on_another():
    x = torch.randn(3, *SHAPE)
    for build, _ in NETWORKS.values():
        net = build()
        assert_close(net(x)[1:2], net(x[1:2]), 1e-4)


def test_under_autocast_all_is_finite():
    config = CycleGANConfig(width=8, blocks=1, pool=2)
    for name, settings in (("cyclegan", config), ("pix2pix", Pix2PixConfig(width=8))):
        gan = make(name, settings, SHAPE, 0)
        step = Step(gan, make_optimizer(gan, settings), precision="bfloat16")
        a, b = (torch.rand(2, *SHAPE) * 2 - 1 for _ in range(2))
        losses = [step(a, b) for _ in range(3)]
        assert all(x.dtype is torch.float32 and x.isfinite() for x in losses[-1]) and step.skipped() == (0, 0)
        assert losses[-1].generator < losses[0].generator


MISTAKES = {
    "no multiple": (lambda: make("pix2pix", Pix2PixConfig(), (3, 30, 30), 0), "multiple of 4 and at least 24 pixels"),
    "too small": (lambda: make("cyclegan", CycleGANConfig(), (1, 8, 8), 0), "at least 24 pixels.*got 8.*--size"),
    "not square": (lambda: make("cyclegan", CycleGANConfig(), (1, 32, 64), 0), "square images, got 32 x 64"),
    "generator": (lambda: ResNetGenerator(3, width=4, blocks=1)(torch.zeros(1, 3, 30, 32)), "H and W multiples of 4"),
    "channels": (lambda: ResNetGenerator(3, width=4, blocks=1)(torch.zeros(1, 1, 32, 32)), r"images \[B, 3, H, W\]"),
    "u-net": (lambda: UNetGenerator(30), "size: expected a multiple of 4, got 30"),
    "critic": (lambda: PatchCritic(3, width=4)(torch.zeros(1, 3, 23, 40)), "of at least 24 pixels a side"),
    "width": (lambda: PatchCritic(3, width=0), "PatchCritic: width: expected at least 1, got 0"),
    "cycle": (lambda: CycleGAN(*[nn.Identity()] * 4, shape=SHAPE, cycle=-1.0), "CycleGAN: cycle: expected at least 0"),
    "l1": (lambda: Pix2Pix(nn.Identity(), nn.Identity(), l1=math.nan), "Pix2Pix: l1: expected at least 0, got nan"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()
