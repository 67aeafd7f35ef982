"""Every recipe of the registry keeps the contract: it trains, resumes, draws or writes, exports, is profiled, and has a
plain twin with the same losses. A new family is checked without a line here, if its settings have the usual names."""

import ast
import runpy
from dataclasses import fields

import pytest
import torch
from alike import assert_close

from genai_fast import ops
from genai_fast.contract import HasNetworks, HasTrainingStep, InTurns, image_traits, networks_of, offers
from genai_fast.data import text
from genai_fast.models import Sampler
from genai_fast.models.common.plain_vae import PlainVAE
from genai_fast.models.common.protocol import Draws, DrawsWaves, Inpaints, Reconstructs, Request, Translates, Upscales
from genai_fast.models.registry import RECIPES
from genai_fast.profiling.systems import System, of_recipe
from genai_fast.runs import export, image_evaluation, text_generation, translation_evaluation
from genai_fast.runs.run import Opened
from genai_fast.training import Step, checkpoint, make_optimizer

TINY = {
    "hidden": 16, "latent": 4, "width": 8, "embedding": 8, "layers": 1, "blocks": 2, "heads": 2, "block": 16,
    "n_critic": 2, "dropout": 0.0, "word_dropout": 0.0, "annealing": 10, "clip": 0.0, "warmup": 0, "decay": "none",
    "weight_decay": 0.0, "beta2": 0.999,
}  # fmt: skip
NETWORKS = {f"dcgan {kind}": ("dcgan", {"network": kind}) for kind in ("dense", "dense-k4", "keras", "keras-k4")}
VARIANTS = {**{name: (name, {}) for name in RECIPES}, "vae gaussian": ("vae", {"likelihood": "gaussian"}), **NETWORKS}
VARIANTS["wgan-gp without norms"] = ("wgan-gp", {"norm": "none"})
VARIANTS["autoencoder denoising"] = ("autoencoder", {"noise": 0.3, "masking": 0.25})
VARIANTS["vae of one layer back"] = ("vae", {"widths": "16,8", "decoder_widths": "none"})
TOKENIZER = text.make_tokenizer("byte", [], None)
CLASSES = ("nought", "one", "two")


@pytest.fixture(params=VARIANTS)
def system(request):
    name, settings = VARIANTS[request.param]
    recipe = RECIPES[name]
    names = {f.name for f in fields(recipe.config)}
    config = recipe.config(**{key: value for key, value in TINY.items() if key in names} | settings)
    shape = (12,) if recipe.feed or recipe.waves else (8, 13) if recipe.sounds else (1, 28, 28)
    return System(name, config, 4, shape, TOKENIZER.size, classes=3 if recipe.labelled else 0)


@pytest.fixture
def run(system, tmp_path):
    """A trained model as `open_run` gives it."""
    torch.manual_seed(0)
    model = system.model()
    Step(model, make_optimizer(model, system.config))(*system.inputs("cpu"))
    about = {"shape": system.shape, "classes": CLASSES[: system.classes]}
    about = {"tokenizer": TOKENIZER} if system.is_text else about
    return Opened(tmp_path, system.recipe, system.config, model.eval(), **about)


def steps_of(step, system, count):
    """Losses of so many steps, [count, losses]."""
    found = [step(*system.inputs("cpu")) for _ in range(count)]
    return torch.stack([torch.stack(x if isinstance(x, tuple) else (x,)) for x in found])


def test_it_trains(system):
    torch.manual_seed(0)
    model, batch = system.model(), system.inputs("cpu")
    assert type(model) is RECIPES[system.recipe].model
    assert offers(model, InTurns) != offers(model, HasTrainingStep)
    assert offers(model, InTurns) == offers(model, HasNetworks)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = Step(model, make_optimizer(model, system.config))(*batch)
    assert all(x.shape == () and x.dtype is torch.float32 and x.isfinite() for x in losses)
    assert set(getattr(type(losses), "_fields", ())) >= ({"generator"} if offers(model, InTurns) else {"loss"})
    after = dict(model.named_parameters())
    same = [name for name, p in before.items() if torch.equal(p, after[name])]
    assert not same and set(networks_of(model)) == set(model.networks() if offers(model, InTurns) else [""])
    if not system.is_text:
        traits = image_traits(model)
        assert traits.classes == system.classes and traits.signed == system.signed
        assert len(batch[0]) == system.batch * traits.n_critic


def test_it_resumes(system, tmp_path):
    """A third step after a checkpoint is the third step without one, bit for bit."""
    torch.manual_seed(0)
    model = system.model()
    optimizer = make_optimizer(model, system.config)
    steps_of(Step(model, optimizer), system, 2)
    checkpoint.save(tmp_path, model, optimizer, 2, {}, {})
    expected = Step(model, optimizer)(*system.inputs("cpu"))
    again = system.model()
    optimizer = make_optimizer(again, system.config)
    checkpoint.restore(checkpoint.latest(tmp_path), again, optimizer)
    assert all(map(torch.equal, Step(again, optimizer)(*system.inputs("cpu")), expected))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_it_draws_or_writes(run, system):
    model = run.model
    if system.is_text:
        for prompt in ([3, 1, 2], []):
            requests = (Request(prompt, TOKENIZER.end, Sampler(seed=7), 9, 7) for _ in range(2))
            written, again = (list(model.write_ids(request)) for request in requests)
            assert written == again and len(written) <= 9 and all(0 <= token < TOKENIZER.end for token in written)
        style = text_generation.Style(max_tokens=9)
        assert "".join(text_generation.write(model, TOKENIZER, "ab", style)) is not None
        assert isinstance(model.continues, bool)
        return
    if offers(model, DrawsWaves):
        labels = torch.arange(5) % system.classes if system.classes else None
        codes = [model.draw_codes(5, 20, labels, seed=3) for _ in range(2)]
        assert torch.equal(*codes) and codes[0].shape == (5, 20)
        return
    assert offers(model, Draws) or offers(model, Reconstructs) or offers(model, Translates) or offers(model, Upscales)
    if offers(model, Draws):
        images = [image_evaluation.generate(model, run.shape, 5, seed=3) for _ in range(2)]
        assert torch.equal(*images) and images[0].shape == (5, *run.shape)
        assert 0 <= images[0].min() < images[0].max() <= 1
        assert len(model.sample(2, seed=1)) == 2
    x, *labels = system.inputs("cpu")
    for to in model.targets if offers(model, Translates) else ():
        images = [translation_evaluation.translate(model, x / 2 + 0.5, to) for _ in range(2)]
        assert torch.equal(*images) and images[0].shape == x.shape and 0 <= images[0].min() < images[0].max() <= 1
    if offers(model, Upscales):
        small = model.lower(x)
        assert small.shape[2:] == tuple(side // model.scale for side in x.shape[2:])
        assert model.upscale(small).shape == x.shape
        assert model.upscale(small[..., 1:]).shape[3] == x.shape[3] - model.scale
    if offers(model, Reconstructs):
        assert model.reconstruct(x, *labels).shape == x.shape
    if offers(model, Inpaints):
        mask = torch.zeros(len(x), 1, *x.shape[2:], dtype=torch.bool)
        mask[..., :9] = True
        repaired = model.inpaint(x, mask, *labels, steps=1, seed=0)
        assert torch.equal(repaired[~mask], x[~mask]) and not torch.equal(repaired, x)


@pytest.fixture
def same_noise(monkeypatch):
    """The noise of variational models is the same in ours and in the plain twin."""

    def drawn(mu, logvar, seed=None):
        return mu + 0.5 * torch.exp(0.5 * logvar)

    def with_kl(mu, logvar, seed=None):
        return drawn(mu, logvar), 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)

    monkeypatch.setattr(ops, "reparameterize", drawn)
    monkeypatch.setattr(ops, "reparameterize_kl", with_kl)
    monkeypatch.setattr(PlainVAE, "reparameterize", lambda self, mu, logvar: drawn(mu, logvar))


def test_its_plain_twin_has_the_same_losses_and_weights(system, same_noise):
    torch.manual_seed(0)
    fused = steps_of(system.fused("cpu"), system, 3)
    torch.manual_seed(0)
    plain = steps_of(system.plain("cpu"), system, 3) / system.plain_scale
    assert_close(fused[:, : plain.size(1)], plain, 1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_in_full_size_it_has_the_keys_and_shapes_of_its_twin(name):
    full, recipe = of_recipe(name), RECIPES[name]
    with torch.device("meta"):
        networks = networks_of(full.model())
        for part, (kind, arguments) in recipe.twins(full.values).items():
            ours, twin = networks[part].state_dict(), kind(**arguments).state_dict()
            assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in twin.items()}


@torch.no_grad()
def test_it_is_exported(run, system, tmp_path):
    """The script, which imports nothing of ours, has the network and draws or writes what the run does."""
    export.write_folder(run, tmp_path / "out")
    source = (tmp_path / "out" / "model.py").read_text()
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("genai_fast" in ast.unparse(node) for node in imported)
    script = runpy.run_path(str(tmp_path / "out" / "model.py"))
    net = script["load"]()
    network = export.network_of(run)
    for key, value in network.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)
    if system.is_text:
        for prompt in ([3, 1, 2], []):
            pick = script["picker"](0.0, 0, 1.0, 7)
            ids = net.generate(prompt, pick, TOKENIZER.end, torch.Generator().manual_seed(7))
            expected = list(run.model.write_ids(Request(prompt, TOKENIZER.end, Sampler(temperature=0), 9, 7)))
            assert [token for token, _ in zip(ids, expected)] == expected  # noqa: B905
    elif offers(run.model, DrawsWaves):
        codes, _, *labels = system.inputs("cpu")
        assert_close(net(codes, *labels), run.model(codes, *labels))
    elif offers(run.model, Draws):
        z = torch.randn(5, image_traits(run.model).latent)
        inputs = (z, torch.arange(5) % system.classes) if system.classes else (z,)
        found = getattr(net, "decode", net)(*inputs).view(-1, *run.shape)
        found = found * 0.5 + 0.5 if system.signed else found
        assert_close(found.clamp(0, 1), image_evaluation.decode(run.model, run.shape, *inputs))
    elif offers(run.model, Translates):
        x, _ = system.inputs("cpu")
        assert_close(net(x), run.model.translate(x))
    elif offers(run.model, Upscales):
        x = run.model.lower(*system.inputs("cpu"))
        assert_close(net(x), run.model.upscale(x))
    else:
        x, *labels = system.inputs("cpu")
        assert_close(net(x, *labels), run.model.reconstruct(x, *labels))
    graph = export.graph_of(run, net)
    inputs = [export._input(axes.split(), system.values)[0] for axes in graph.inputs.values()]
    found = getattr(net, graph.method)(*inputs)
    assert len(found if isinstance(found, tuple) else (found,)) == len(graph.outputs)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_profiled_with_the_batch_that_is_asked_for(name):
    system = of_recipe(name, 2, "bfloat16")
    assert system.config.batch_size == system.batch == 2 and system.config.precision == "bfloat16"
    n_critic = getattr(system.config, "n_critic", 1)
    assert {len(x) for x in system.inputs("cpu")} == {2 * n_critic}
