"""The few rows that the top-level README.md shows of each GPU, from the newest green record of it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record, records
from bench.points import COMPILED, FUSED
from bench.records import Record, ReportError, title
from bench.results_page import best, microseconds, milliseconds, slower, speed, table

BEGIN, END = "<!-- gpu headline: begin -->", "<!-- gpu headline: end -->"
# Chosen before any was measured: (op, case, dtype).
OPS = (
    ("reparameterize_kl", "vae_wide-4096x512", "float32"),
    ("vae_loss", "conv_vae_64-128x12288", "float32"),
    ("batch_norm_act", "dcgan_64-256x64x32x32-channels_last", "bfloat16"),
    ("conv_transpose2d_batch_norm_act", "dcgan_64-128x128x16x16-64", "bfloat16"),
    ("causal_attention", "16x16x1024x64", "bfloat16"),
    ("cross_entropy", "gpt2-8192x50257", "bfloat16"),
    ("lstm", "char_rnn-128x128x256-256", "bfloat16"),
)
# At any batch.
TRAINING = ("mlp_vae", "conv_vae_64", "dcgan_64", "dcgan_64_bfloat16", "gpt_nano", "gpt_nano_bfloat16", "gpt2_bfloat16")
DECODING = ("gpt2_bfloat16",)
_HEADER = ("case", "fused ms", "eager ms", "best torch.compile ms", "eager / fused", "best peer / fused")


def headline(results: Path) -> str:
    """Markdown for the README, from all records below a folder; made-up ones are left out, and stderr says so.

    Raises:
        ReportError: there is no such folder, or a record is damaged or foreign.
    """
    if not results.is_dir():
        raise ReportError(f"{results}: expected a folder of records, got none; remedy: --headline bench/results")
    by_device: dict[str, list[Record]] = defaultdict(list)
    for path in sorted(results.rglob("*.json")):
        found = records.read(path)
        if found.sample:
            print(f"report: {path}: left out: a made-up sample is no result", file=sys.stderr)
        else:
            by_device[found.device].append(found)
    measure = "`python -m bench.gpu_gate` on a machine with an NVIDIA GPU checks and measures every op there"
    if not by_device:
        return f"No GPU has been measured yet; {measure}."
    return "\n\n".join(_device(device, found, measure) for device, found in sorted(by_device.items()))


def _device(device: str, found: Sequence[Record], measure: str) -> str:
    newest, *_ = found = sorted(found, key=lambda r: r.content["date"], reverse=True)
    # What was measured with uncommitted changes is of no commit.
    green = next((r for r in found if r.green and not r.content.get("dirty")), None)
    if green is None:
        return (
            f"**{device}**: no green gate on a commit yet, so no speed-up is shown (the newest, {newest.day}, commit"
            f" {newest.commit}: {newest.verdict}); {measure}."
        )
    lines = [f"**{device}**, {green.day}, commit {green.commit}{_page(green)}:", ""]
    if newest is not green:
        lines[0] = lines[0][:-1] + f" (a newer gate, {newest.day}, commit {newest.commit}: {newest.verdict}):"
    lines += [
        *table(_HEADER, _rows(green)),
        "",
        "Ops: forward and backward, on the device. Steps and tokens: wall time.",
        "",
    ]
    behind, count = slower(green), len(green.all_figures)
    if not behind:
        return "\n".join([*lines, f"Of {count} figures, fused is slower than the best peer in none."])
    named = records.listed(f"{what} ({ratio:.3f} against {peer})" for what, peer, ratio in behind)
    return "\n".join([*lines, f"Of {count} figures, fused is slower than the best peer in {len(behind)}: {named}."])


def _rows(green: Record) -> list[list[str]]:
    by_case = {(f["op"], f["case"], f["dtype"]): f for f in green.content["figures"]}
    found = [by_case.get(case, {"op": case[0], "case": case[1], "dtype": case[2]}) for case in OPS]
    steps = [f for f in green.training if f["system"].partition("_batch")[0] in TRAINING]
    return [_row(f) for f in (*found, *steps, *(f for f in green.decoding if f["case"] in DECODING))]


def _row(figure: dict[str, Any]) -> list[str]:
    variants, ratio = figure.get("variants", {}), figure.get("ratio", {})
    wall = "system" in figure  # the clock of its ratios
    compiled = [v for name, v in variants.items() if name.startswith(COMPILED) and "skipped" not in v]
    shown = (variants.get(FUSED), variants.get("eager"), min(compiled, key=lambda v: v["wall_us"], default=None))
    times = [milliseconds(microseconds(v, wall=wall)) for v in shown]
    return [title(figure), *times, speed(ratio.get("eager")), speed(best({"ratio": ratio})[1])]


def _page(green: Record) -> str:
    """A link, where the record lies in the checkout."""
    folder = green.path.resolve().parent
    inside = folder.is_relative_to(record.ROOT)
    return f" ([all figures]({folder.relative_to(record.ROOT).as_posix()}/README.md))" if inside else ""
