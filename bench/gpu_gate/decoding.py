"""The stage "decoding": a GPT generating token by token after half a block of text, beside the loops people write.

Logits are compared first: if they are wrong there are no figures. All variants share one process and are timed in turn.
A peer that torch.compile cannot serve is skipped, with the reason in the figure; the others must run.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bench import roofs
from bench.gpu_gate.training import REDUCED, say, wait
from bench.variants import in_turn, ratios, ready, walls
from genai_fast.errors import UsageError
from genai_fast.kernels.gpt_decode import layout
from genai_fast.models import GPT, Sampler, decoder_for
from genai_fast.profiling import ForeignLoad
from genai_fast.profiling.loops import EAGER, FUSED
from genai_fast.registry import OPS

ROUNDS = 7
TOKENS = 64  # of one clocking: behind the first, nothing waits for the host
CHECKED = 8  # tokens whose logits are compared
# Of logits, by the largest: bfloat16 rounds the stream between the layers on a GPU, as it does in eager.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
PICK = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}

_DECODE = OPS["gpt_decode"]
_eager = _DECODE.peers["eager"]

Pick = Callable[[torch.Tensor], torch.Tensor]  # logits [B, V] -> ids [B]


@dataclass(frozen=True)
class Model:
    """Sizes of a GPT with new weights, and how many texts it writes side by side."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    block: int
    dtype: torch.dtype = torch.float32
    batch: int = 1

    @property
    def held(self) -> int:
        """Tokens in the cache before the first that is clocked."""
        return self.block // 2

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def make(self, device: str) -> GPT:
        torch.manual_seed(0)
        return GPT(self.vocabulary, self.block, self.layers, self.heads, self.width).to(device).eval()

    def prompt(self, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.batch, self.held), generator=generator).to(device)


MEASURED = {
    "gpt2_bfloat16": Model(12, 12, 768, 50257, 1024, torch.bfloat16),
    "gpt2_bfloat16_batch16": Model(12, 12, 768, 50257, 1024, torch.bfloat16, 16),
    "gpt2": Model(12, 12, 768, 50257, 1024),
    "gpt_nano": Model(6, 6, 384, 512, 256),
}


class Loop(NamedTuple):
    """`begin` goes back to `held` tokens; `token(ids [B])` appends one more, and gives logits [B, V]."""

    begin: Callable[[], Any]
    token: Callable[[torch.Tensor], torch.Tensor]


def fused(model: Model, device: str) -> Loop:
    """What generates text: on a GPU the model in its dtype, on a CPU the float32 one with its matrices rounded."""
    gpt = model.make(device)
    if device == "cpu":
        decoder = decoder_for(gpt, model.batch, model.precision)
    else:
        decoder = decoder_for(gpt.to(model.dtype), model.batch)
    return Loop(functools.partial(decoder.prefill, model.prompt(device)), decoder.step)


def eager(model: Model, device: str, dtype: torch.dtype | None = None) -> Loop:
    """The loop around a cache of fixed size, of which each token reads what is held."""
    weights, cache = _weights(model, device, dtype or model.dtype)
    length = model.held
    _eager(model.prompt(device), cache, 0, weights)

    def begin() -> None:
        nonlocal length
        length = model.held

    def token(ids: torch.Tensor) -> torch.Tensor:
        nonlocal length
        length += 1
        return _eager(ids[:, None], cache, length - 1, weights)

    return Loop(begin, token)


def compiled(model: Model, device: str) -> Loop:
    """As people write it for torch.compile: no shape depends on the token's place, so all of the cache is read."""
    weights, cache = _weights(model, device, model.dtype)
    _eager(model.prompt(device), cache, 0, weights)
    static, place = _Static(weights, cache), torch.full((1,), model.held, device=device)
    run = torch.compile(static, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def token(ids: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = run(ids.clone(), place)  # ids may lie in what the next replay writes
        place.add_(1)
        return logits

    return Loop(lambda: place.fill_(model.held), token)


class _Static(nn.Module):
    """A module's parameters and buffers stay where a captured graph expects them."""

    def __init__(self, weights: list[torch.Tensor], cache: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)
        self.register_buffer("cache", cache)

    def forward(self, ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        layers, _, batch, heads, room, head_dim = self.cache.shape
        weights, channels = list(self.weights), heads * head_dim
        seen = (torch.arange(room, device=ids.device) <= place)[None, None, None]
        x = weights[0][ids] + weights[1][place]
        for layer in range(layers):
            first = len(layout.FIRST) + layer * len(layout.LAYER)
            ln_1, ln_1_bias, qkv, qkv_bias, proj, proj_bias, ln_2, ln_2_bias, fc, fc_bias, out, out_bias = weights[
                first : first + len(layout.LAYER)
            ]
            q, k, v = F.linear(F.layer_norm(x, (channels,), ln_1, ln_1_bias), qkv, qkv_bias).chunk(3, -1)
            keys, values = self.cache[layer, 0], self.cache[layer, 1]
            keys.index_copy_(2, place, k.view(batch, heads, 1, head_dim))
            values.index_copy_(2, place, v.view(batch, heads, 1, head_dim))
            h = F.scaled_dot_product_attention(q.view(batch, heads, 1, head_dim), keys, values, attn_mask=seen)
            x = x + F.linear(h.reshape(batch, channels), proj, proj_bias)
            h = F.gelu(F.linear(F.layer_norm(x, (channels,), ln_2, ln_2_bias), fc, fc_bias), approximate="tanh")
            x = x + F.linear(h, out, out_bias)
        return F.linear(F.layer_norm(x, (channels,), *weights[-3:-1]), weights[-1])


def _weights(model: Model, device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The list of gpt_decode, rounded as the model's are, and an empty cache of `dtype`."""
    state = model.make(device).to(model.dtype).state_dict()
    weights = [state[name].to(dtype) for name in layout.names(model.layers)]
    shape = (model.layers, 2, model.batch, model.heads, model.block, model.width // model.heads)
    return weights, torch.zeros(shape, dtype=dtype, device=device)


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
    weights, cache = _weights(model, "meta", model.dtype)
    cost = _DECODE.cost(first[:, None], cache, model.held + TOKENS // 2, weights)
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
