"""The stage "decoding": a GPT or a Llama writing token by token after half a block of text, beside others' loops.

Logits are compared first: if they are wrong there are no figures. All variants share one process and are timed in turn.
A peer that torch.compile cannot serve is skipped, with the reason in the figure; the others must run.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench import roofs
from bench.gpu_gate.training import REDUCED, say, wait
from bench.gpu_gate.writers import LlamaModel, Model
from bench.variants import in_turn, ratios, ready, walls
from genai_fast.errors import UsageError
from genai_fast.models import Sampler, decoder_for
from genai_fast.profiling import ForeignLoad
from genai_fast.profiling.loops import EAGER, FUSED

ROUNDS = 7
TOKENS = 64  # of one clocking: behind the first, nothing waits for the host
CHECKED = 8  # tokens whose logits are compared
# Of logits, by the largest: bfloat16 rounds the stream between the layers on a GPU, as it does in eager.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
PICK = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}

Pick = Callable[[torch.Tensor], torch.Tensor]  # logits [B, V] -> ids [B]


MEASURED = {
    "gpt2_bfloat16": Model(12, 12, 768, 50257, 1024, torch.bfloat16),
    "gpt2_bfloat16_batch16": Model(12, 12, 768, 50257, 1024, torch.bfloat16, 16),
    "gpt2": Model(12, 12, 768, 50257, 1024),
    "gpt_nano": Model(6, 6, 384, 512, 256),
    "llama_bfloat16": LlamaModel(12, 12, 768, 32000, 1024, torch.bfloat16, kv_heads=4),
    "llama_nano": LlamaModel(6, 6, 384, 512, 256, kv_heads=2),
}


class Loop(NamedTuple):
    """`begin` goes back to `held` tokens; `token(ids [B])` appends one more, and gives logits [B, V]."""

    begin: Callable[[], Any]
    token: Callable[[torch.Tensor], torch.Tensor]


def fused(model: Model, device: str) -> Loop:
    """What generates text: on a GPU the model in its dtype, on a CPU the float32 one with its matrices rounded."""
    made = model.make(device)
    if device == "cpu":
        decoder = decoder_for(made, model.batch, model.precision)
    else:
        decoder = decoder_for(made.to(model.dtype), model.batch)
    return Loop(functools.partial(decoder.prefill, model.prompt(device)), decoder.step)


def eager(model: Model, device: str, dtype: torch.dtype | None = None) -> Loop:
    """The loop around a cache of fixed size, of which each token reads what is held."""
    weights, cache = model.state(device, dtype or model.dtype)
    length = model.held
    model.call(model.prompt(device), cache, 0, weights)

    def begin() -> None:
        nonlocal length
        length = model.held

    def token(ids: torch.Tensor) -> torch.Tensor:
        nonlocal length
        length += 1
        return model.call(ids[:, None], cache, length - 1, weights)

    return Loop(begin, token)


def compiled(model: Model, device: str) -> Loop:
    """As people write it for torch.compile: no shape depends on the token's place, so all of the cache is read."""
    weights, cache = model.state(device, model.dtype)
    model.call(model.prompt(device), cache, 0, weights)
    static, place = model.static(weights, cache), torch.full((1,), model.held, device=device)
    run = torch.compile(static, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def token(ids: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = run(ids.clone(), place)  # ids may lie in what the next replay writes
        place.add_(1)
        return logits

    return Loop(lambda: place.fill_(model.held), token)


@torch.no_grad()
def red(model: Model, device: str) -> str:
    """What is wrong with the logits of some tokens of a text, ours against eager's in float32; "" if nothing."""
    loops = fused(model, device), eager(model, device, torch.float32)
    for loop in loops:
        loop.begin()
    generator = torch.Generator().manual_seed(1)
    for number in range(1, CHECKED + 1):
        ids = torch.randint(model.vocabulary, (model.batch,), generator=generator).to(device)
        found, expected = (loop.token(ids).float() for loop in loops)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE[model.dtype]:  # nor is NaN
            return f"logits of token {number}: expected an error below {TOLERANCE[model.dtype]}, got {error:.3g}"
    return ""


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


@torch.no_grad()
def written(loop: Loop, pick: Pick, ids: torch.Tensor) -> float:
    """Seconds a token, of TOKENS that follow one another; ids [B]: the first."""
    loop.begin()
    wait(ids.device.type)
    begun = time.perf_counter()
    for _ in range(TOKENS):
        ids = pick(loop.token(ids))
    wait(ids.device.type)
    return (time.perf_counter() - begun) / TOKENS


def variants(model: Model, device: str, compile_too: bool = True) -> dict[str, Callable[[], Loop]]:
    """name -> what makes the loop. The fused one is the first: peers take what memory is left."""
    found = {FUSED: lambda: fused(model, device), EAGER: lambda: eager(model, device)}
    return found | ({REDUCED: lambda: compiled(model, device)} if compile_too else {})


def figures(name: str, device: str, rounds: int = ROUNDS, compile_too: bool = True) -> dict[str, Any]:
    """All figures of a model.

    wall_us: median of a token, including the choice of the likeliest. sampled_us: of one drawn by
    `Sampler(**PICK)`, as generated text is. ratio, tokens_per_second and the share of the roof: of the fused loop, by
    wall_us; bytes are those of the weights and of what the cache holds, each once.
    """
    if name not in MEASURED:
        raise UsageError(f"{name}: expected one of {', '.join(MEASURED)}")
    model = MEASURED[name]
    head = {"op": "decoding", "case": name, "dtype": model.precision, "device": device, "batch": model.batch}
    say(name, "logits")
    if message := red(model, device):
        return {**head, "failures": {"numerics": message}}
    load, first = ForeignLoad(), torch.zeros(model.batch, dtype=torch.int64, device=device)

    @torch.no_grad()
    def warmed(variant: str, make: Callable[[], Loop]) -> Loop:
        say(name, variant)
        loop = make()
        written(loop, likeliest, first)  # compiled and captured by then
        return loop

    makers = {v: functools.partial(warmed, v, make) for v, make in variants(model, device, compile_too).items()}
    loops, skipped = ready(makers, (REDUCED,))
    say(name, "figures")
    seconds = in_turn(lambda loop: written(loop, likeliest, first), loops, rounds)
    found = walls(seconds) | skipped
    sampler, ours = Sampler(**PICK), seconds[FUSED]
    sampled = statistics.median(
        written(loops[FUSED], lambda logits: sampler(logits).to(device), first) for _ in range(rounds)
    )
    weights, cache = model.state("meta", model.dtype)
    cost = model.cost(first[:, None], cache, model.held + TOKENS // 2, weights)
    return {
        **head,
        "variants": {variant: found[variant] for variant in (*(v for v in found if v != FUSED), FUSED)},
        "ratio": ratios(seconds),
        "tokens_per_second": round(model.batch / ours, 1),
        "sampled_us": round(sampled * 1e6, 2),
        "gigabytes_per_second": round(cost.bytes / ours / 1e9, 2),
        "gigaflops_per_second": round(cost.flops / ours / 1e9, 2),
        "share_of_roof": round(roofs.share(device, ours, cost.bytes, cost.flops), 3),
        "foreign_load": load.cores(),
    }


def work(name: str, device: str, rounds: int = ROUNDS, compiled: bool = True) -> dict[str, Any]:
    return figures(name, device, rounds, compiled)
