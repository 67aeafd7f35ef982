"""The page of one GPU: README.md and its plots, from the records that the GPU gate wrote there.

Speed-ups, and bars of them, stand there only where the gate is green on the commit that was measured.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench import records
from bench.points import COMPILED, FUSED
from bench.records import Record, title
from genai_fast.autotune import Choice
from genai_fast.cli.tune import table as choices
from genai_fast.errors import require

SAMPLE = "made-up sample record: these are not measurements"
PAGE, MARK = "README.md", "<!-- made by python -m bench.report -->"
IMAGES = SPEED, TRAINING, PARITY = "speed.png", "training.png", "parity.png"
_MOST = 40  # lines of what is wrong
_PLAIN, _FUSED, _COMPILE, _SLOWER = "#9aa0a6", "#2f7ed8", "#e8a33d", "#c5221f"
_UNITS = {"memory_bytes": (2**30, "GiB"), "power_watts": (1, "W"), "power_limit_watts": (1, "W")}


def page(found: Sequence[Record]) -> dict[str, bytes]:
    """File name -> content, from the records of one GPU, newest first: the newest that is through is shown."""
    shown = next((record for record in found if record.through), found[0])
    content, images = shown.content, _images(shown)
    parts = [
        [MARK, "", f"# {shown.device}"],
        _banner(shown),
        _head(shown),
        _ops(shown, images),
        _slower(shown) if shown.green else [],
        _training(shown, images),
        _paths(shown),
        _decoding(shown),
        _tuning(content.get("tuning", {})),
        _section("Training curves", _image(images, PARITY, "losses, plain and fused")),
        _section("No figure", [f"- {r['point']}: {_code(r['reason'])}" for r in content["refused"]]),
        _section("To know", [f"- {note}" for note in _notes(shown)]),
        _others([record for record in found if record is not shown]),
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part) + "\n"
    return {**images, PAGE: text.encode()}


def _banner(record: Record) -> list[str]:
    said: list[list[str]] = []
    if record.sample:
        said.append([f"**{SAMPLE}**"])
    if record.content.get("dirty"):
        said.append(["**Measured with uncommitted changes:** no commit is what was measured."])
    wrong = record.wrong()
    if wrong:
        said.append([f"**The gate is red**, so no speed-up is shown. Wrong: {', '.join(_ops_of(wrong))}.", ""])
        said[-1] += [f"- {task}: {_code(why)}" for task, why in wrong[:_MOST]]
        said[-1] += [f"- and {len(wrong) - _MOST} more"] if len(wrong) > _MOST else []
    elif record.through and not record.green:
        said.append(["**The gate is red**, so no speed-up is shown; the record does not say what is wrong."])
    if not record.through:
        said.append(["**The gate is not through**, so no speed-up is shown. Not reached:", ""])
        said[-1] += [f"- {what}" for what in record.not_reached()] or [
            "- parts of a stage: the record does not say which"
        ]
    return [f"> {line}".rstrip() for k, block in enumerate(said) for line in ([""] if k else []) + block]


def _ops_of(wrong: Iterable[tuple[str, str]]) -> list[str]:
    return sorted({task.partition("-")[0] for task, _ in wrong})


def _head(record: Record) -> list[str]:
    content, machine = record.content, record.content["environment"]
    stages = ", ".join(f"{len(content[s])} {s}" for s in records.STAGES if content.get(s))
    lines = [
        f"- commit {record.commit}, {content['date']}: the gate is {record.verdict} ({stages or 'nothing done'},"
        f" {len(content['figures'])} figures)"
    ]
    for name in records.CHECKS:
        if check := content.get(name):
            said = "passed" if check.get("passed") else f"skipped: {check['skipped']}" if "skipped" in check else "red"
            lines.append(f"- {name.replace('_', ' ')}: {said}")
    return [*lines, *machine_lines(machine)]


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """Device, driver, versions and measured roofs."""
    lines = []
    for name, value in machine.items():
        if name in _UNITS and isinstance(value, (int, float)):
            scale, unit = _UNITS[name]
            value = f"{value / scale:.4g} {unit}"
        if not isinstance(value, dict):
            lines.append(f"- {name}: {value}")
    for roof, value in machine.get("roofs", {}).items():
        unit = "GB/s" if roof == "bytes_per_second" else "GFLOP/s"
        lines.append(f"- roof, {'copy' if unit == 'GB/s' else roof}: {value / 1e9:.1f} {unit}")
    return lines


def _ops(record: Record, images: Iterable[str]) -> list[str]:
    header = ["op", "case", "dtype", "fused ms", "eager ms", "best eager ms", "torch.compile ms"]
    header += ["eager / fused", "best peer / fused", "rate", "of roof"] if record.green else []
    rows = []
    for f in record.content["figures"]:
        variants = f["variants"]
        eager = [v for name, v in variants.items() if name not in (FUSED, COMPILED)]
        fused, plain, compiled = (microseconds(variants.get(name)) for name in (FUSED, "eager", COMPILED))
        best_eager = min(filter(None, map(microseconds, eager)), default=None)
        row = [f["op"], f["case"], f["dtype"], *map(milliseconds, (fused, plain, best_eager, compiled))]
        if record.green:
            row += [speed(f["ratio"].get("eager")), speed(best(f)[1]), _rate(f, record)]
            row += [_optional(f, "share_of_roof", "{:.0%}")]
        rows.append(row)
    if not rows:
        return _section("Ops", ["Nothing was measured."])
    words = [
        "",
        "Forward and backward; time on the device where there is one, medians of interleaved runs in one process.",
    ]
    if record.green:
        words.append("Best peer: the fastest of all that is not fused. Roof: the nearer one, float32's.")
    return _section("Ops", [*table(header, rows), *words, *_image(images, SPEED, "speed of the fused ops", gap=True)])


def _rate(f: dict[str, Any], record: Record) -> str:
    """GB/s or GFLOP/s: what the nearer of the two roofs is made of."""
    roofs = record.content["environment"].get("roofs", {})
    by_bytes = (f.get("gigabytes_per_second") or 0.0) / roofs.get("bytes_per_second", float("inf"))
    by_flops = (f.get("gigaflops_per_second") or 0.0) / roofs.get("float32", float("inf"))
    if by_flops > by_bytes:
        return _optional(f, "gigaflops_per_second", "{:.0f} GFLOP/s")
    return _optional(f, "gigabytes_per_second", "{:.0f} GB/s")


def slower(record: Record) -> list[tuple[str, str, float]]:
    """(what, the best peer, its time over the fused one's) of all that a peer does faster."""
    return [(title(f), *best(f)) for f in record.all_figures if f["ratio"] and best(f)[1] < 1.0]


def _slower(record: Record) -> list[str]:
    lines = [f"- {what}: {ratio:.3f} against {peer}" for what, peer, ratio in slower(record)]
    return _section("Where the fused path is slower", lines or ["Nowhere, of what was measured."])


def best(figure: dict[str, Any]) -> tuple[str | None, float | None]:
    """The fastest peer, and its time over the fused one's."""
    return min(figure["ratio"].items(), key=lambda pair: pair[1], default=(None, None))


def speed(ratio: float | None) -> str:
    """A peer's time over the fused one's; where that is less than 1 it says so."""
    return "-" if ratio is None else f"{ratio:.2f}" if ratio >= 1.0 else f"**{ratio:.3f} slower**"


def microseconds(variant: dict[str, Any] | None, *, wall: bool = False) -> float | None:
    """On the device where that was measured, else (or for `wall`) of the clock on the wall; None: not measured."""
    if variant is None or "skipped" in variant:
        return None
    return variant["wall_us"] if wall else variant.get("device_us", variant["wall_us"])


def milliseconds(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us / 1e3:.{4 if us < 1e2 else 3 if us < 1e4 else 1}f}"


def _training(record: Record, images: Iterable[str]) -> list[str]:
    header = ["system", "case", "dtype", "batch", "variant", "ms", "device ms", "launches", "peak MiB", "J a step"]
    header += ["samples/s", "tokens/s", "MFU"] + (["its time / fused"] if record.green else [])
    rows = []
    for f in record.training:
        for name, v in _measured(f["variants"]):
            row = [f["system"], *(f.get(n) for n in ("case", "dtype", "batch")), name, milliseconds(v["wall_us"])]
            row += [milliseconds(v.get("device_us")), _optional(v, "launches", "{}")]
            row += [f"{v['peak_bytes'] / 2**20:.1f}" if v.get("peak_bytes") is not None else None]
            row += [_optional(v, "joules_per_step", "{:.3g}")]
            mine = f if name == FUSED else {}
            row += [_optional(mine, n, "{:.0f}") for n in ("samples_per_second", "tokens_per_second")]
            row += [_optional(mine, "mfu", f"{{:.1%}} of {f.get('mfu_precision', 'the roof')}")]
            row += [speed(f["ratio"].get(name))] if record.green else []
            rows.append(["-" if cell is None else str(cell) for cell in row])
    words = ["", "ms: wall time of a step, which is what speed-ups are of."]
    lines = [*table(header, rows), *words, *_image(images, TRAINING, "speed of the fused steps", gap=True)]
    return _section("Training steps", lines if rows else [])


def _measured(variants: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those that ran: eager ones, compiled ones, fused."""
    ran = [(name, v) for name, v in variants.items() if "skipped" not in v]
    return sorted(ran, key=lambda v: (v[0] == FUSED, v[0].startswith(COMPILED), v[0]))


def _paths(record: Record) -> list[str]:
    """Which way each convolution of the fused steps goes, and why."""
    chosen = {key: Choice(**choice) for figure in record.training for key, choice in figure.get("paths", {}).items()}
    if not chosen:
        return []
    header, *rows = choices(chosen)
    return _section("The path of each convolution", table(header, rows))


def _decoding(record: Record) -> list[str]:
    header = ["model", "dtype", "batch", "variant", "us a token", "drawn, us", "tokens/s"]
    header += ["rate", "of roof", "its time / fused"] if record.green else []
    rows = []
    for f in record.decoding:
        for name, v in _measured(f["variants"]):
            mine = f if name == FUSED else {}
            row = [f["case"], f["dtype"], str(f.get("batch", "-")), name, f"{v['wall_us']:.1f}"]
            row += [_optional(mine, "sampled_us", "{:.1f}"), _optional(mine, "tokens_per_second", "{:.0f}")]
            if record.green:
                row += [_rate(mine, record), _optional(mine, "share_of_roof", "{:.0%}"), speed(f["ratio"].get(name))]
            rows.append(row)
    words = ["", "us a token: wall time of a token, the likeliest each time; drawn: by temperature, top-k and top-p."]
    return _section("Decoding", [*table(header, rows), *words] if rows else [])


def _tuning(found: dict[str, Any]) -> list[str]:
    """The launches whose settings were changed, and why the others' were not."""
    searched = [t for t in found.values() if not records.failures(t)]
    rows = [
        [
            t.get("kernel", "-"),
            t.get("case", "-"),
            _optional(t, "default_us", "{:.1f}"),
            _optional(t, "best_us", "{:.1f}"),
            ", ".join(f"{name} {value}" for name, value in t.get("settings", {}).items()),
        ]
        for t in searched
        if t.get("kept")
    ]
    lines = table(["kernel", "case", "default us", "best us", "settings"], rows) if rows else []
    left = Counter(t.get("reason") or "it does not say why" for t in searched if not t.get("kept"))
    if left:
        lines += ["", f"Left as they were: {', '.join(f'{n} ({why})' for why, n in left.most_common())}."]
    return _section("Tuning", lines)


def _notes(record: Record) -> list[str]:
    content = record.content
    found = records.notes(record.all_figures)
    for f in content["figures"]:
        if by := [name for name, v in f["variants"].items() if v.get("device_clock") == "events"]:
            found.append(f"{title(f)}: {', '.join(by)} not captured as a graph: launches may count")
    for f in record.training:
        found += [f"{title(f)}: fused is no captured graph"] if f["variants"][FUSED].get("captured") is False else []
    for system, f in content.get("training", {}).items():
        found += [f"training step of {system} was skipped: {f['skipped']}"] if "skipped" in f else []
    found += [f"not done yet: {names}" for names in record.not_reached()] if record.through else []
    if (content.get("foreign_load") or 0.0) > records.OTHERS:
        found.append(f"over the whole gate other programs kept {content['foreign_load']:.1f} processors busy")
    return found


def _others(found: Sequence[Record]) -> list[str]:
    rows = [[r.day, r.commit, r.verdict, _optional(r.content, "minutes", "{:.0f}")] for r in found]
    return _section("Other records", table(["date", "commit", "gate", "minutes"], rows) if rows else [])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _section(name: str, lines: list[str]) -> list[str]:
    return [f"## {name}", "", *lines] if lines else []


def _image(images: Iterable[str], name: str, what: str, *, gap: bool = False) -> list[str]:
    return [*([""] if gap else []), f"![{what}]({name})"] if name in images else []


def _code(text: str) -> str:
    return f"`{records.first_line(text).replace('`', chr(39))}`"


def _optional(values: dict[str, Any], name: str, pattern: str) -> str:
    return pattern.format(values[name]) if values.get(name) is not None else "-"


def _images(record: Record) -> dict[str, bytes]:
    """Bars only of a green record; curves of any, as they show what is wrong."""
    found = {}
    curves = {s: c for s, c in record.content.get("parity", {}).items() if c.get("plain") and c.get("fused")}
    if curves:
        found[PARITY] = png(parity_plot(curves))
    if record.green:
        for name, figures in ((SPEED, record.content["figures"]), (TRAINING, record.training)):
            if figures := [f for f in figures if f["ratio"]]:
                found[name] = png(speed_plot(figures, record.device))
    return found


def new_figure(width: float, height: float) -> Any:
    """A figure of its own: pyplot would choose a window system for the whole process."""
    require("matplotlib.backends.backend_agg", "bench")
    return require("matplotlib.figure", "bench").Figure(figsize=(width, height), dpi=110, layout="constrained")


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def speed_plot(figures: Sequence[dict[str, Any]], device: str) -> Any:
    """For each figure how many times as fast fused is as its best peer (a bar), as eager and torch.compile (dots)."""
    figure = new_figure(9.0, 1.0 + 0.19 * len(figures))
    axes = figure.subplots()
    bars = [(k, best(f)[1] - 1.0) for k, f in enumerate(figures)]
    faster, slower = [b for b in bars if b[1] >= 0.0], [b for b in bars if b[1] < 0.0]
    for kind, colour, said in ((faster, _FUSED, "best peer"), (slower, _SLOWER, "best peer, which is faster")):
        if kind:
            axes.barh(*zip(*kind, strict=True), 0.7, left=1.0, color=colour, label=said)
    for name, colour in (("eager", _PLAIN), (COMPILED, _COMPILE)):
        points = [(f["ratio"][name], k) for k, f in enumerate(figures) if name in f["ratio"]]
        if points:
            axes.plot(*zip(*points, strict=True), "o", ms=3, color=colour, label=name)
    axes.axvline(1.0, color="#5f6368", linewidth=0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(figures)), [title(f) for f in figures], fontsize=6)
    axes.set_ylim(len(figures) - 0.5, -0.5)  # the first on top
    axes.set_xlabel("time of the peer / time of fused; left of 1 fused is slower", fontsize=8)
    axes.set_title(device, fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    return figure


def parity_plot(curves: dict[str, dict[str, Any]]) -> Any:
    """Losses of each system, plain and fused."""
    figure = new_figure(3.2 * len(curves), 2.6)
    for axes, (system, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for side, colour in (("plain", _PLAIN), ("fused", _FUSED)):
            axes.plot(range(1, len(found[side]) + 1), found[side], lw=1.0, color=colour, label=side)
        axes.set_title(f"{system}{', red' if records.failures(found) else ''}", fontsize=8)
        axes.set_xlabel("step", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)
    return figure
