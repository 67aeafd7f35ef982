"""Samples a second of a WaveNet on this CPU: our decoder, the same loop in eager PyTorch, the network without caches.

    python -m bench.sound_decoding [--width 64] [--batch 1 8] [--rounds 5] [--threads 1]

They take turns, and each figure is the median of its rounds: ratios mean something on a busy machine too. The loops are
short where they are slow; each sample costs the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from genai_fast import use_backend
from genai_fast.kernels.wavenet_decode.reference import drawn
from genai_fast.models import WaveNet, WaveNetDecoder
from genai_fast.models.wavenet.plain import PlainWaveNet

STEPS = {"ours": 2000, "eager, with caches": 60, "eager, the whole reach": 4}


@torch.no_grad()
def without_caches(plain: PlainWaveNet, reach: int, uniforms: torch.Tensor) -> torch.Tensor:
    """Each code by the network on all that it depends on: as long as a sound is longer than that."""
    codes = torch.full((len(uniforms), reach), 128)
    for t in range(uniforms.size(1)):
        logits = plain(codes[:, -reach:])[:, -1]
        codes = torch.cat([codes, drawn(logits, uniforms[:, t], 1.0)[:, None]], 1)
    return codes[:, reach:]


def ways(model: WaveNet, batch: int) -> dict[str, Callable[[], object]]:
    plain = PlainWaveNet(model.embedding.embedding_dim, model.head[1].in_channels, 10, 2)
    plain.load_state_dict(model.state_dict())
    decoders = {name: WaveNetDecoder(model, batch) for name in STEPS}

    def cached() -> object:
        with use_backend("reference"):
            return decoders["eager, with caches"].draw(STEPS["eager, with caches"])

    few = torch.rand(batch, STEPS["eager, the whole reach"])
    return {
        "ours": lambda: decoders["ours"].draw(STEPS["ours"]),
        "eager, with caches": cached,
        "eager, the whole reach": lambda: without_caches(plain, model.reach, few),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=64, help="channels; twice as many skip; default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sounds at a time; default: 1 8")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    model = WaveNet(options.width, 2 * options.width, layers=10, cycles=2).eval()
    print(f"20 layers x {options.width}, reach {model.reach}, {torch.get_num_threads()} threads")
    print("| sounds | way | samples a second | ours / this |\n| --- | --- | --- | --- |")
    for batch in options.batch:
        made = ways(model, batch)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for name in made:
            made[name]()
        for _ in range(options.rounds):
            for name, call in made.items():
                begin = time.perf_counter()
                call()
                seconds[name].append((time.perf_counter() - begin) / STEPS[name])
        ours = statistics.median(seconds["ours"])
        for name, found in seconds.items():
            one = statistics.median(found)
            print(f"| {batch} | {name} | {batch / one:,.0f} | {one / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
