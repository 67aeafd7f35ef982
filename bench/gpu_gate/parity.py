"""The stage "parity": fifty fused steps (on CUDA one captured graph) follow the curve of the plain PyTorch script.

Both start from the same weights and see the same batches, with float32 multiplied in full precision. Noise and dropout
are drawn differently, and GPU arithmetic rounds differently, so means over ten steps are compared within `TOLERANCE` of
the plain curve's. That is enough to catch an optimizer that does nothing or a frozen batch.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from genai_fast.precision import float32_products
from genai_fast.profiling.systems import SYSTEMS, System

STEPS, WINDOW, BATCHES = 50, 10, 5
MOTIFS, SYMBOLS = 8, 64  # of the batches
# Of the mean loss over a window. Other noise shows where a VAE's loss falls steeply; two networks against each other
# drift apart.
TOLERANCE = {"mlp_vae": 0.05, "dcgan_64": 0.25, "gpt_nano": 0.02, "llama_nano": 0.02, "lstm": 0.02}


def batches(system: str, device: str) -> list[tuple[torch.Tensor, ...]]:
    """With something to learn in them: pictures of a few motifs, lines that count in steps."""
    chosen, found = SYSTEMS[system], []
    for k in range(BATCHES):
        first, *rest = chosen.inputs(device)
        rows = torch.arange(len(first), device=device) + k
        if first.is_floating_point():
            motifs = (first[:MOTIFS] > 0.6).to(first.dtype)
            first = (motifs * 2 - 1 if chosen.signed else motifs)[rows % MOTIFS]
        else:
            columns = torch.arange(first.size(1) + 1, device=device)
            ids = (rows[:, None] + columns * (rows[:, None] % MOTIFS + 1)) % SYMBOLS
            first, rest[0] = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        found.append((first, *rest))
    return found


@contextlib.contextmanager
def multiplying_in_full(system: System, device: str, batch: Sequence[torch.Tensor]) -> Iterator[None]:
    """For comparing losses: two networks against each other drift apart by TF32's rounding, a thousandth.

    Which path of a convolution is the fastest is asked first, in PyTorch's own precision: the choice is remembered, and
    steps that are timed later must not take what is fastest in another one.
    """
    if device == "cuda":
        system.fused(device)(*batch)
    with float32_products():
        yield


def curves(system: str, device: str, steps: int = STEPS) -> dict[str, list[float]]:
    """The losses of each step, plain and fused."""
    fed = batches(system, device)
    with multiplying_in_full(SYSTEMS[system], device, fed[0]):
        return _curves(SYSTEMS[system], device, fed, steps)


def _curves(chosen: System, device: str, fed: Sequence[Sequence[torch.Tensor]], steps: int) -> dict[str, list[float]]:
    found = {}
    for side, make in (("plain", chosen.plain), ("fused", chosen.fused)):
        torch.manual_seed(0)
        step, losses = make(device), []
        for k in range(steps):
            said = step(*fed[k % BATCHES])
            first = said[0] if isinstance(said, tuple) else said
            losses.append(first.detach().float() / (chosen.plain_scale if side == "plain" else 1))
        found[side] = torch.stack(losses).tolist()
    return found


def wrong(found: dict[str, list[float]], tolerance: float) -> str:
    """What is wrong with the fused curve; "" if nothing."""
    plain, fused = ([_mean(losses[k : k + WINDOW]) for k in range(0, len(losses), WINDOW)] for losses in found.values())
    for k, (a, b) in enumerate(zip(plain, fused, strict=True)):
        if not math.isfinite(b) or abs(a - b) > tolerance * abs(a):
            return f"steps {WINDOW * k + 1} to {WINDOW * (k + 1)}: expected a mean loss of {a:.5g}, got {b:.5g}"
    if abs(plain[-1] - plain[0]) <= tolerance * abs(plain[0]):
        return f"the plain loss hardly moves ({plain[0]:.5g} to {plain[-1]:.5g}): nothing is proved"
    return ""


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def work(system: str, device: str, steps: int = STEPS) -> dict[str, Any]:
    found = curves(system, device, steps)
    message = wrong(found, TOLERANCE[system])
    return {"failures": {"parity": message} if message else {}, **found}
