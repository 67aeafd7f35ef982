"""Drawing beside the plain PyTorch scripts that people write: images of noise, and texts token by token.

Both sides have the same weights, noise and settings, and each is asked for the same numbers: greedy tokens, or images.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench import memory
from bench.points import DEVICE, QUICK, ROUNDS
from bench.variants import FUSED, ratios, spreads, walls, warm
from genai_fast.contract import image_traits, networks_of, offers
from genai_fast.models.common import latents
from genai_fast.models.common.protocol import Draws, Request, Writes
from genai_fast.models.registry import RECIPES
from genai_fast.profiling import ForeignLoad, compare
from genai_fast.profiling.systems import SYSTEMS

EAGER = "eager"
SECONDS = 2.0
IMAGES, PROMPT, TOKENS = 64, 32, 64
TOLERANCE = 2e-3  # of images in [0, 1] or [-1, 1]

IMAGES_OF, FIRST_TOKEN, TOKENS_OF = f"draw {IMAGES} images", "first token", f"generate {TOKENS} tokens"


def _likeliest(logits: torch.Tensor) -> Any:
    return logits.argmax(-1)


@dataclass(frozen=True)
class Subject:
    """What a system draws."""

    system: str
    op: str

    def __str__(self) -> str:
        return f"{self.op.replace(' ', '_')}-{self.system}"

    @property
    def case(self) -> str:
        size = "x".join(map(str, SYSTEMS[self.system].shape))
        return f"{self.system}-{size}" if self.op == IMAGES_OF else f"{self.system}-after {PROMPT}"

    def _both(self) -> tuple[Any, Any]:
        """Our model and the twin that draws, with the same weights."""
        system = SYSTEMS[self.system]
        torch.manual_seed(0)
        model = system.model().eval()
        recipe = RECIPES[system.recipe]
        name, (kind, arguments) = next(iter(recipe.twins(system.values).items()))
        twin = kind(**arguments).eval()
        twin.load_state_dict(networks_of(model)[name].state_dict())
        return model.to(DEVICE), twin.to(DEVICE)

    def calls(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Of each variant: what it draws, as tensors."""
        model, twin = self._both()
        return self._drawing(model, twin) if self.op == IMAGES_OF else self._writing(model, twin)

    def _drawing(self, model: Any, twin: Any) -> dict[str, Callable[[], torch.Tensor]]:
        traits, shape = image_traits(model), SYSTEMS[self.system].shape
        given = [latents.normal(IMAGES, model.latent, 0).to(DEVICE)]
        given += [torch.arange(IMAGES, device=DEVICE) % traits.classes] if traits.classes else []

        def ours() -> torch.Tensor:
            x = model.decode(*given)
            return (x.sigmoid() if traits.likelihood == "bernoulli" else x).view(-1, *shape)

        decode = getattr(twin, "decode", twin)
        return {EAGER: torch.no_grad()(lambda: decode(*given).view(-1, *shape)), FUSED: torch.no_grad()(ours)}

    def _writing(self, model: Any, twin: Any) -> dict[str, Callable[[], torch.Tensor]]:
        end, count = SYSTEMS[self.system].vocabulary - 1, 1 if self.op == FIRST_TOKEN else TOKENS
        prompt = torch.randint(end, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()

        def ours() -> torch.Tensor:
            return torch.tensor([*model.write_ids(Request(prompt, end, _likeliest, count, seed=0))])

        def theirs() -> torch.Tensor:
            noise = torch.Generator().manual_seed(0)
            drawn = twin.generate(prompt, lambda logits: int(logits.argmax()), end, noise)
            return torch.tensor([*itertools.islice(drawn, count)])

        return {EAGER: torch.no_grad()(theirs), FUSED: torch.no_grad()(ours)}


def _subjects() -> list[Subject]:
    """The first system of each recipe that draws or writes on."""
    found, seen = [], set()
    for name, system in SYSTEMS.items():
        recipe = RECIPES[system.recipe]
        if recipe.name in seen or system.config.precision != "float32":
            continue
        seen.add(recipe.name)
        if recipe.feed and DEVICE == "cpu" and offers(recipe.model, Writes):
            found += [Subject(name, op) for op in (FIRST_TOKEN, TOKENS_OF)]
        elif offers(recipe.model, Draws) and not (recipe.sounds or recipe.waves or recipe.translates):
            found.append(Subject(name, IMAGES_OF))
    return found


SUBJECTS = _subjects()


@functools.cache
def red(subject: Subject) -> str:
    """Why the two sides do not draw the same; "" if they do."""
    results = {name: call() for name, call in subject.calls().items()}
    found, expected = results[FUSED], results[EAGER]
    if found.shape != expected.shape:
        return f"{subject}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not found.is_floating_point():
        return "" if torch.equal(found, expected) else f"{subject}: other tokens: {found}, expected {expected}"
    error = (found - expected).abs().max().item()
    return "" if error <= TOLERANCE else f"{subject}: error {error:g}"


def figures(
    subject: Subject, seconds: float = SECONDS, *, rounds: int = ROUNDS, compiled: bool = True
) -> dict[str, Any]:
    """Median wall time of both sides, interleaved, and the bytes that each holds at most."""
    del compiled  # a loop over tokens is not compiled
    load = ForeignLoad()
    calls = {name: warm(call) for name, call in subject.calls().items()}
    clocked = compare(calls, rounds=rounds, seconds=seconds, calls=1)
    wall = {name: t.median for name, t in clocked.timings.items()}
    variants = walls(wall)
    for name, call in calls.items():
        variants[name]["peak_bytes"] = memory.peak_bytes(call, DEVICE)
    head = {"op": subject.op, "case": subject.case, "dtype": "float32", "device": DEVICE}
    measured = {"ratio": ratios(wall), "spread": spreads(clocked), "foreign_load": load.cores()}
    return {**head, "variants": variants, **measured}


@pytest.mark.parametrize("subject", [pytest.param(s, id=str(s)) for s in SUBJECTS])
@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
def test_generation(benchmark, measured, quick, subject):
    clock = functools.partial(figures, subject, **(QUICK if quick else {}))
    measured(benchmark, "figures", str(subject), lambda: red(subject), lambda: [clock()])
    benchmark(subject.calls()[FUSED])
