"""Tokens a second of a Llama on this CPU: our decoders, transformers' generate, and the plain twin without a cache.

    python -m bench.text_decoding [--layers 12] [--width 768] [--vocabulary 32000] [--held 200] [--rounds 5]

All have the same weights and write the same tokens, which is checked first. They take turns, and each figure is the
median of its rounds: ratios mean something on a busy machine too. The plain twin writes few tokens: each costs the
whole text.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from genai_fast.models import Llama, generate
from genai_fast.models.llama import pretrained
from genai_fast.models.llama.plain import PlainLlama
from genai_fast.runs import export

TOKENS, FEW = 32, 2  # after the first, which waits for the prompt
OURS = {"ours": "float32", "ours, bfloat16": "bfloat16", "ours, int8": "int8"}
PEER, PLAIN = "transformers, generate", "plain, without a cache"

Write = Callable[[int], list[int]]  # a number of tokens at most


def transformers_model(model: Llama, folder: Path) -> torch.nn.Module:
    """The same model by transformers, which is slow to import."""
    import transformers

    settings, tensors = pretrained.written(model)
    export.write_checkpoint(folder, settings, tensors, {})
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def ways(model: Llama, plain: PlainLlama, peer: torch.nn.Module, prompt: torch.Tensor) -> dict[str, Write]:
    """name -> what continues the prompt [T] by its likeliest tokens."""

    def ours(weights: str) -> Write:
        return lambda count: list(generate(model, prompt, max_tokens=count, temperature=0, weights=weights))

    def theirs(count: int) -> list[int]:
        new = {"min_new_tokens": count, "max_new_tokens": count}
        found = peer.generate(prompt[None], do_sample=False, pad_token_id=0, eos_token_id=None, **new)
        return found[0, len(prompt) :].tolist()

    def whole(count: int) -> list[int]:
        tokens: Iterator[int] = plain.generate(prompt.tolist(), lambda logits: int(logits.argmax()), 0)
        return list(itertools.islice(tokens, min(count, 1 + FEW)))

    return {**{name: ours(weights) for name, weights in OURS.items()}, PEER: theirs, PLAIN: whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, help="channels, in heads of 64; default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=32000, help="default: %(default)s")
    parser.add_argument("--held", type=int, default=200, help="tokens of the prompt; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    heads, block = options.width // 64, options.held + TOKENS + 1
    sizes = dict(vocabulary=options.vocabulary, block=block, layers=options.layers, heads=heads, width=options.width)
    model = Llama(**sizes, kv_heads=max(heads // 3, 1), tied=False).eval()
    plain = PlainLlama(**sizes, kv_heads=max(heads // 3, 1), tied=False).eval()
    plain.load_state_dict(model.state_dict())
    prompt = torch.randint(options.vocabulary, (options.held,), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        made = ways(model, plain, transformers_model(model, Path(folder) / "hf"), prompt)
    first = {name: write(1 + TOKENS) for name, write in made.items()}
    if first[PEER] != first["ours"] or first[PLAIN] != first["ours"][: 1 + FEW]:
        raise SystemExit(f"expected the same tokens from all, got {first}")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, write in made.items():
            seconds[name].append(clocked(write))
    threads = torch.get_num_threads()
    print(f"{options.layers} layers x {options.width}, {options.held} tokens of prompt, {threads} threads")
    print("| way | prompt, ms | tokens a second | ours / this |\n| --- | --- | --- | --- |")
    for name, found in seconds.items():
        prompt_seconds, each = map(statistics.median, zip(*found, strict=True))
        ratio = statistics.median(a / b for (_, a), (_, b) in zip(found, seconds["ours"], strict=True))
        print(f"| {name} | {prompt_seconds * 1e3:,.0f} | {1 / each:,.1f} | {ratio:.2f} |", flush=True)


def clocked(write: Write) -> tuple[float, float]:
    """(seconds to the first token, seconds of each after it)."""
    begin = time.perf_counter()
    write(1)
    middle = time.perf_counter()
    count = len(write(1 + TOKENS))
    end = time.perf_counter()
    return middle - begin, (end - middle - (middle - begin)) / (count - 1)


if __name__ == "__main__":
    main()
