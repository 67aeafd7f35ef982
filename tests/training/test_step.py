"""The training step: strangers' models, accumulation, precision, what is not finite, mistakes."""

import copy
import math
import warnings

import pytest
import torch
from step_models import Averaged, Losses, batches, equal, everything, mse_of, plain_net
from torch import nn

from genai_fast.kernels.common import onednn
from genai_fast.models import MLPVAE, LSTMLanguageModel
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.training import Step, checkpoint, make_optimizer
from genai_fast.training import step as step_module


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_is_the_loop_that_everyone_writes(clip):
    def new():
        torch.manual_seed(0)
        model = MLPVAE(64, 32, 4)
        return model, make_optimizer(model, VAEConfig())

    x = torch.rand(32, 1, 8, 8)
    (model, optimizer), (other, adam) = new(), new()
    step = Step(model, optimizer, clip=clip)
    torch.manual_seed(1)
    found = [step(x) for _ in range(3)]
    torch.manual_seed(1)
    for ours in found:
        adam.zero_grad()
        theirs = other.training_step(x)
        theirs.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), clip or math.inf)
        assert not clip or norm > clip  # it does clip
        adam.step()
        assert torch.equal(ours.loss, theirs.loss) and not ours.loss.requires_grad
    assert equal(model, other)


FORMS = {
    "tensor": (lambda loss, error: loss, lambda r: r),
    "tuple": (lambda loss, error: (loss, error), lambda r: r[0]),
    "named tuple": (lambda loss, error: Losses(error, loss), lambda r: r.loss),
    "dict": (lambda loss, error: {"error": error, "loss": loss}, lambda r: r["loss"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_strangers_model_and_loss(form):
    made, read = FORMS[form]
    net, other, criterion = plain_net(), plain_net(), nn.MSELoss()
    optimizer, sgd = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (net, other))

    def loss_fn(x, y):
        loss = criterion(net(x), y)
        return made(loss, loss.detach().sqrt())

    step = Step(loss_fn, optimizer)
    for x, y in batches(3):
        result = step(x, y)
        sgd.zero_grad()
        loss = criterion(other(x), y)
        loss.backward()
        sgd.step()
        assert type(result) is type(made(loss, loss)) and not read(result).requires_grad
        assert torch.equal(read(result), loss)
    assert equal(net, other)


def adversaries():
    torch.manual_seed(0)
    generator, critic = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 1)
    pair = nn.ModuleDict({"generator": generator, "critic": critic})
    return pair, torch.optim.SGD(critic.parameters(), lr=0.1), torch.optim.Adam(generator.parameters(), lr=0.01)


@pytest.mark.parametrize("returns", [True, False], ids=["returns", "returns nothing"])
def test_a_strangers_gan_of_two_optimizers(returns):
    pair, *optimizers = adversaries()
    other, sgd, adam = adversaries()

    def losses(pair, real, fake):
        return pair.critic(fake).mean() - pair.critic(real).mean()

    def turns(real):
        fake = pair.generator(torch.randn(len(real), 3))
        first = losses(pair, real, fake.detach())
        yield pair.critic.parameters(), first
        second = -pair.critic(fake).mean()  # reaches the critic's weights too
        yield list(pair.generator.parameters()), second
        if returns:
            return {"critic": first, "generator": second}

    step = Step(turns, optimizers)
    for real, (_, target) in enumerate(batches(4)):
        torch.manual_seed(real)
        result = step(target)
        torch.manual_seed(real)
        fake = other.generator(torch.randn(len(target), 3))
        sgd.zero_grad()
        first = losses(other, target, fake.detach())
        first.backward()
        sgd.step()
        adam.zero_grad()
        second = -other.critic(fake).mean()
        second.backward()
        adam.step()
        assert isinstance(result, dict) == returns
        assert all(map(torch.equal, result.values() if returns else result, (first, second)))
    assert equal(pair, other)


def test_a_turn_steps_and_changes_nothing_but_its_own():
    pair, critics, generators = adversaries()
    stepped = []
    for name, optimizer in (("critic", critics), ("generator", generators)):
        optimizer.register_step_post_hook(lambda *_, name=name: stepped.append(name))
    before = copy.deepcopy(pair)

    def turns(x):
        yield pair.generator.parameters(), pair.critic(pair.generator(x)).mean()

    Step(turns, [critics, generators])(torch.randn(5, 3))
    assert stepped == ["generator"]
    assert equal(pair.critic, before.critic) and not equal(pair.generator, before.generator)
    assert all(p.grad is None for p in pair.critic.parameters())
    # One optimizer for both, as recipes have: what is not in the turn stays, though the loss reaches it.
    both = torch.optim.SGD(pair.parameters(), lr=0.1)
    Step(turns, both)(torch.randn(5, 3))
    assert equal(pair.critic, before.critic)


@pytest.mark.parametrize("rows", [12, 13, 2], ids=["even", "uneven", "fewer than parts"])
def test_parts_of_a_batch_are_the_whole_batch(rows):
    net, other = plain_net().double(), plain_net().double()
    temperature = torch.tensor(0.5)

    def loss_of(model):
        def loss(x, y, t):
            error = nn.functional.mse_loss(model(x), y)
            return {"loss": error * t, "error": error}

        return loss

    step = Step(loss_of(net), torch.optim.Adam(net.parameters()), accumulate=3, clip=0.1)
    whole = Step(loss_of(other), torch.optim.Adam(other.parameters()), clip=0.1)
    for x, y in batches(4, rows):
        found, expected = (s(x.double(), y.double(), temperature) for s in (step, whole))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_float16_scales_the_loss_as_torchs_scaler(clip):
    net, other = plain_net(), plain_net()
    optimizer, sgd = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, other))
    step = Step(lambda x, y: nn.functional.mse_loss(net(x), y), optimizer, precision="float16", clip=clip)
    step.load_state_dict({**step.state_dict(), "scale": torch.tensor(2.0**21), "growth": torch.tensor(0).int()})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
    scaled_down = 0
    for x, y in batches(12):
        step(x, y)
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(other(x), y)
        sgd.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(sgd)
        if clip:
            nn.utils.clip_grad_norm_(other.parameters(), clip)
        scaler.step(sgd)
        before = scaler.get_scale()
        scaler.update()
        scaled_down += scaler.get_scale() < before
        assert float(step.state_dict()["scale"]) == scaler.get_scale()
    assert equal(net, other) and not equal(net, plain_net())
    assert 1 < scaled_down < 10 and step.skipped() == (scaled_down, 0)
    assert all(p.dtype is torch.float32 for p in net.parameters())


def test_the_scale_grows_after_a_while_and_a_resumed_step_goes_on_with_it(tmp_path):
    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    new = lambda: Step(lambda x, y: nn.functional.mse_loss(net(x), y), optimizer, precision="float16")  # noqa: E731
    step, (batch,) = new(), batches(1)
    for _ in range(2):
        step(*batch)
    step.load_state_dict({**step.state_dict(), "growth": torch.tensor(1998, dtype=torch.int32)})
    step(*batch)
    path = checkpoint.save(tmp_path, net, optimizer, 3, {}, {}, training_step=step.state_dict())
    resumed = new()
    resumed.load_state_dict(checkpoint.restore(path, net, optimizer)["training_step"])
    for s in (step, resumed):
        assert float(s.state_dict()["scale"]) == 2.0**16
        s(*batch)
        assert float(s.state_dict()["scale"]) == 2.0**17 and s.state_dict()["growth"] == 0
    with pytest.raises(ValueError, match=r"state: expected .*'skipped': \(2,\).* for precision float32, got .*scale"):
        Step(mse_of(net), optimizer).load_state_dict(step.state_dict())
    # A checkpoint from before there was such a state resumes with a new one.
    assert (
        checkpoint.restore(checkpoint.save(tmp_path, net, optimizer, 4, {}, {}), net, optimizer)["training_step"] == {}
    )


@pytest.fixture
def deferred(monkeypatch):
    """The decision whether to update falls on the device, as on CUDA; the CPU's fused optimizers know it too."""
    monkeypatch.setattr(step_module, "_can_defer", lambda device, groups: True)


def fused(model, kind="adam"):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9, fused=True)
    return torch.optim.Adam(trained, lr=0.01, fused=True)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cause", ["batch", "gradient"])
def test_what_is_not_finite_changes_nothing_at_all(request, where, precision, cause):
    if where == "device":
        request.getfixturevalue("deferred")
    model, twin = Averaged(), Averaged()
    optimizer, its = fused(model), fused(twin)
    step, other = (Step(m, o, precision=precision, clip=0.5) for m, o in ((model, optimizer), (twin, its)))
    if precision == "float16":  # no overflow by the scale itself
        for s in (step, other):
            s.load_state_dict({**s.state_dict(), "scale": torch.tensor(256.0)})
    (x, y), *more = batches(4)
    for s in (step, other):
        s(x, y)
    before = everything(model, optimizer)
    assert any(x.dtype is torch.int64 and x == 1 for x in before)  # num_batches_tracked
    for row in (1, 2):
        if cause == "batch":
            result = step(x.clone().index_fill_(0, torch.tensor(3), math.nan), y)
            assert result.loss.isnan()
        else:
            handle = model.net[0].bias.register_hook(lambda g: g * math.inf)
            assert step(x, y).loss.isfinite()  # the loss says nothing
            handle.remove()
        after = everything(model, optimizer)
        assert len(after) == len(before) and all(map(torch.equal, before, after))
        assert step.skipped() == (row, row)
    if precision == "float16":
        assert float(step.state_dict()["scale"]) == 64.0
        step.load_state_dict({**step.state_dict(), "scale": torch.tensor(256.0)})
    for x, y in more:
        assert all(map(torch.equal, step(x, y), other(x, y)))
    assert equal(model, twin) and step.skipped() == (2, 0)
    assert not torch.equal(model.average[0].weight, before[0])


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_optimizer_may_begin_with_a_step_that_is_not_finite(deferred, kind):
    """A fused SGD that is told to skip its first step would keep whatever memory its momentum was given."""
    model, twin = Averaged(), Averaged()
    step, other = Step(model, fused(model, kind)), Step(twin, fused(twin, kind))
    good, (x, y) = batches(2)
    step(x * math.nan, y)
    for s in (step, other):
        s(*good), s(x, y)
    assert equal(model, twin)


def test_buffers_of_a_loss_functions_modules_are_put_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hidden = [net]  # where nobody looks

    class Trainer:
        def __init__(self):
            self.net = net

        def loss(self, x, y):
            return nn.functional.mse_loss(self.net(x), y)

    ways = {
        "variable": Step(lambda x, y: nn.functional.mse_loss(net(x), y), optimizer),
        "attribute": Step(Trainer().loss, optimizer),
        "given": Step(lambda x, y: nn.functional.mse_loss(hidden[0](x), y), optimizer, module=net),
    }
    before = everything(net, optimizer)
    ((x, y),) = batches(1)
    for step in ways.values():
        step(x * math.inf, y)
        assert step.skipped() == (1, 1) and all(map(torch.equal, before, everything(net, optimizer)))


def test_a_carried_state_is_put_back_though_the_step_has_replaced_it():
    torch.manual_seed(0)
    model = LSTMLanguageModel(9, embedding=4, hidden=5, layers=1)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.randint(9, (3, 6))
    step(ids[:1], ids[:1], torch.ones(1))
    before = model.carried()
    with torch.no_grad():
        bias, model.decoder.bias[0] = model.decoder.bias[0].clone(), math.nan
    step(ids, ids, torch.ones(3))  # of more rows: the state grows, which makes another tensor
    assert step.skipped() == (1, 1)
    after = model.carried()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        model.decoder.bias[0] = bias
    step(ids, ids, torch.ones(3))
    assert step.skipped() == (1, 0) and model.carried()["h"].shape == (1, 3, 5)


def nothing(x, y):
    yield from ()


def step_of(function, *batch, **options):
    """A call that makes a Step of a function of (net, x, y), and takes a step."""

    def call():
        net = plain_net()
        made = Step(lambda x, y: function(net, x, y), torch.optim.SGD(net.parameters(), lr=0.1), **options)
        return made(*(batch or batches(1)[0]))

    return call


def mse(net, x, y):
    return nn.functional.mse_loss(net(x), y)


def turn(what):
    def turns(net, x, y):
        yield what(net, mse(net, x, y))

    return step_of(turns)


def grown():
    optimizer = new_sgd()
    step = Step(lambda x, y: mse(plain_net(), x, y), optimizer)
    optimizer.add_param_group({"params": list(plain_net().parameters())})
    step(*batches(1)[0])


def new_sgd():
    return torch.optim.SGD(plain_net().parameters(), lr=0.1)


MISTAKES = {
    "no loss": (lambda: Step(plain_net(), new_sgd())(torch.ones(2, 8)), r"got the loss: a tensor of shape \(2, 4\)"),
    "None": (step_of(lambda net, x, y: None), "return a 0-d loss tensor, .* got NoneType"),
    "a number": (step_of(lambda net, x, y: mse(net, x, y).item()), "got float"),
    "an output": (step_of(lambda net, x, y: (mse(net, x, y), net(x))), r"got entry 1: a tensor of shape \(12, 4\)"),
    "a dict": (step_of(lambda net, x, y: {"mse": mse(net, x, y)}), "dict with 'loss', got a dict with 'mse'"),
    "detached": (step_of(lambda net, x, y: mse(net, x, y).detach()), "remedy: no detach"),
    "other weights": (
        step_of(lambda net, x, y: mse(nn.Linear(8, 4), x, y)),
        "on the turn's parameters, got one that does not",
    ),
    "no turn": (step_of(lambda net, x, y: nothing(x, y)), "to be yielded, got nothing"),
    "a loss alone": (turn(lambda net, loss: loss), r"\(parameters, loss\) to be yielded, .*got a tensor of shape \(\)"),
    "a module": (turn(lambda net, loss: (nn.Linear(1, 1), loss)), "got a Linear as parameters"),
    "strange weights": (
        turn(lambda net, loss: (nn.Linear(1, 7).parameters(), loss)),
        r"got a tensor of shape \(7, 1\) that no optim",
    ),
    "no weights": (turn(lambda net, loss: ([], loss)), "got none that is trained"),
    "batch": (step_of(mse, torch.ones(2, 8), [1, 2]), r"expected tensors, got list as number 1; remedy: step\(\*t"),
    "dict batch": (step_of(mse, {"x": 1}), r"got dict as number 0; .*step\(\*batch.values\(\)\)"),
    "no function": (lambda: Step(3, new_sgd()), "a loss function or a model with training_step or turns, got a int"),
    "precision": (lambda: Step(mse, new_sgd(), precision="half"), "float32 or bfloat16 or float16, got 'half'"),
    "clip": (lambda: Step(mse, new_sgd(), clip=-1.0), "clip >= 0"),
    "accumulate": (lambda: Step(mse, new_sgd(), accumulate=0), "accumulate: expected an integer >= 1, got 0"),
    "parts of turns": (lambda: Step(nothing, new_sgd(), accumulate=2), "expected 1 for networks in turns"),
    "parts of hidden turns": (step_of(lambda net, x, y: nothing(x, y), accumulate=2), "1 for networks in turns"),
    "parts of a state": (
        lambda: Step(LSTMLanguageModel(9), new_sgd(), accumulate=2),
        "rows carry a state from batch to batch, got 2",
    ),
    "parts of two sizes": (
        step_of(mse, torch.ones(4, 8), torch.ones(3, 4), accumulate=2),
        r"first dimension, got \[\(4, 8\), \(3, 4\)\]",
    ),
    "closure": (lambda: Step(mse, torch.optim.LBFGS(plain_net().parameters())), "takes no closure, got LBFGS"),
    "another group": (grown, "the parameter groups it had at the start, got others; remedy: a new Step"),
    "no optimizer": (lambda: Step(mse, []), "expected one with parameters, got none"),
    "shared": (
        lambda: Step(mse, [torch.optim.SGD(net.parameters()) for net in [plain_net()] for _ in range(2)]),
        r"disjoint parameters, got one of shape \(16, 8\) in two of them",
    ),
    "not capturable": (
        lambda: Step(mse, torch.optim.Adam(plain_net().parameters()), graph=True),
        r"capturable=False; remedy: torch\.optim\.Adam\(.*fused=True, capturable=True",
    ),
    "not fused": (lambda: Step(mse, new_sgd(), graph=True), "fused=False; remedy"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_precision_that_the_processor_imitates_is_said(monkeypatch):
    monkeypatch.setattr(onednn, "serves", lambda dtype: False)
    model = nn.Linear(2, 1)

    def make(precision):
        Step(lambda x: model(x).mean(), torch.optim.SGD(model.parameters(), 0.1), precision=precision)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("float32")
    with pytest.warns(UserWarning, match="does not support bfloat16: PyTorch emulates it"):
        make("bfloat16")
