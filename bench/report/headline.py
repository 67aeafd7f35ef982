"""The few rows that the top-level README.md shows of each device, from its newest green record."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.points import COMPILED, FUSED
from bench.report import files, records
from bench.report.records import Record, ReportError
from bench.report.tables import Figure, best, cell, milliseconds, slower, speed, table, title

BEGIN, END = "<!-- headline: begin -->", "<!-- headline: end -->"
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
# At any batch size.
TRAINING = ("mlp_vae", "conv_vae_64", "dcgan_64", "dcgan_64_bfloat16", "gpt_nano", "gpt_nano_bfloat16", "gpt2_bfloat16")
DECODING = ("gpt2_bfloat16",)
# On a CPU, in float32.
CPU_OPS = (
    ("reparameterize_kl", "vae_wide-4096x512"),
    ("vae_loss", "conv_vae_64-64x12288"),
    ("batch_norm_act", "dcgan_64-64x64x32x32"),
    ("group_norm_act", "diffusion-8x256x32x32-channels_last"),
    ("conv_transpose2d_batch_norm_act", "dcgan_64-64x128x16x16-64"),
    ("causal_attention", "gpt-1x6x1024x64"),
    ("cross_entropy", "gpt2-512x50257"),
    ("gru", "char_rnn-128x32x256-256"),
    ("gpt_decode", "gpt2-12x768-50257"),
    ("fuse, training", "dcgan_64_generator-contiguous"),
    ("fuse, training", "conv_vae_64_last_block-contiguous"),
)
CPU_TRAINING = ("mlp_vae", "conv_vae_64", "mlp_gan", "dcgan_64", "gpt_nano", "lstm", "text_vae", "seq2seq")
SETTINGS = ("stock process", "tuned process", "eager stock, fused tuned")
_HEADER = ("case", "fused ms", "eager ms", "best torch.compile ms", "eager / fused", "best peer / fused")
_CLOCKS = {
    "cuda": "Ops: forward and backward, device time. Steps and tokens: wall time.",
    "cpu": "Medians of interleaved runs. Under `tune_cpu()` freed memory is kept and the faster library multiplies.",
}
_MEASURE = "`python -m bench.gpu_gate` on a machine with an NVIDIA GPU checks and measures every op there"


def headline(results: Path, chosen: Iterable[Path] | None = None) -> str:
    """Markdown for the README, from all records below a folder; made-up ones are left out, with a line on stderr.

    chosen: of these records alone.

    Raises ReportError: there is no such folder, or a record is damaged or foreign.
    """
    if not results.is_dir():
        raise ReportError(f"{results}: expected a folder of records, got none; remedy: --headline bench/results")
    by_device: dict[str, list[Record]] = defaultdict(list)
    for found in map(records.read, sorted(results.rglob("*.json")) if chosen is None else chosen):
        if found.sample:
            print(f"report: {found.path}: left out: a made-up sample is no result", file=sys.stderr)
        else:
            by_device[found.device].append(found)
    shown = {device: _device(device, found) for device, found in sorted(by_device.items())}
    gpus = [text for device, text in shown.items() if not by_device[device][0].on_cpu]
    cpus = [text for device, text in shown.items() if by_device[device][0].on_cpu]
    return "\n\n".join([*cpus, *(gpus or [f"No GPU has been measured yet; {_MEASURE}."])])


def _device(device: str, found: Sequence[Record]) -> str:
    newest, *_ = found = sorted(found, key=lambda r: r.content["date"], reverse=True)
    # What was measured with uncommitted changes belongs to no commit.
    green = next((r for r in found if r.green and not r.content.get("dirty")), None)
    gate = f"{newest.day}, commit {newest.commit}: {newest.verdict}"
    if green is None:
        return f"**{device}**: no green gate on a commit yet, so no speed-up is shown (the newest, {gate}); {_MEASURE}."
    folder = green.path.resolve().parent
    inside = folder.is_relative_to(files.ROOT)
    link = f" ([all figures]({folder.relative_to(files.ROOT).as_posix()}/README.md))" if inside else ""
    newer = f" (a newer gate, {gate})" if newest is not green else ""
    rows = _cpu_rows(green) if green.on_cpu else _rows(green)
    lines = [f"**{device}**, {green.day}, commit {green.commit}{link}{newer}:", "", *table(_HEADER, *rows), ""]
    behind, count = sorted(slower(green.figures()), key=lambda found: found[2]), len(green.figures())
    named = records.listed((f"{what} ({ratio:.3f} against {peer})" for what, peer, ratio in behind), most=4)
    if green.on_cpu:
        lines += [*_steps(green), ""]
    lines += [_CLOCKS["cpu" if green.on_cpu else "cuda"], ""]
    lines.append(f"Of {count} figures, fused is slower than the best peer in {len(behind) or 'none'}")
    return "\n".join(lines) + (f": {named}." if behind else ".")


def _rows(green: Record) -> list[list[str]]:
    by_case = {(f["op"], f["case"], f["dtype"]): f for f in green.figures("figures")}
    found = [by_case.get(case, dict(zip(("op", "case", "dtype"), case, strict=True))) for case in OPS]
    found += [f for f in green.figures("training") if f["system"].partition("_batch")[0] in TRAINING]
    return [_row(f) for f in found + [f for f in green.figures("decoding") if f["case"] in DECODING]]


def _cpu_rows(green: Record) -> list[list[str]]:
    by_case = {(f["op"], f["case"]): f for f in green.figures("figures") if f["dtype"] == "float32"}
    return [_row(by_case[case]) for case in CPU_OPS if case in by_case]


def _steps(green: Record) -> list[str]:
    """A table of training steps: one process as PyTorch comes, one under tune_cpu, and the first beside the second."""
    header = ("training step", "PyTorch ms", "ours ms", "speed-up", "same settings", "both under `tune_cpu()`")
    by_name = green.content["training"]
    rows = []
    for system in CPU_TRAINING:
        stock, tuned, mixed = (by_name.get(f"{system}, {setting}") for setting in SETTINGS)
        if mixed:
            times = [milliseconds(mixed["variants"][v]["wall_us"]) for v in ("eager", FUSED)]
            rows.append([system, *times, *(speed(f["ratio"]["eager"]) for f in (mixed, stock, tuned))])
    return table(header, *rows)


def _row(figure: Figure) -> list[str]:
    clock = "wall_us" if "system" in figure else "device_us"  # the clock of its ratios
    ran = {name: v for name, v in figure.get("variants", {}).items() if "skipped" not in v}
    compiled = min((v for n, v in ran.items() if n.startswith(COMPILED)), key=lambda v: v["wall_us"], default={})
    times = [{"us": v.get(clock, v.get("wall_us"))} for v in (ran.get(FUSED, {}), ran.get("eager", {}), compiled)]
    ratios = speed(figure.get("ratio", {}).get("eager")), speed(best(figure)[1])
    return [title(figure), *(cell(t, "us", milliseconds) for t in times), *ratios]
