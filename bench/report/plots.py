"""The report's plots, as PNG files."""

import io
from collections.abc import Sequence
from typing import Any

from bench.points import COMPILED
from bench.report.records import failures
from bench.report.tables import Figure, best, title
from genai_fast.errors import require

_PLAIN, _FUSED, _COMPILE, _SLOWER = "#9aa0a6", "#2f7ed8", "#e8a33d", "#c5221f"


def _new(width: float, height: float) -> Any:
    """A figure of its own: pyplot would choose a window system for the whole process."""
    require("matplotlib.backends.backend_agg", "bench")
    return require("matplotlib.figure", "bench").Figure(figsize=(width, height), dpi=110, layout="constrained")


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    small = io.BytesIO()  # few colours need a quarter of the bytes
    require("PIL.Image", "bench").open(buffer).convert("RGB").quantize(255).save(small, "PNG", optimize=True)
    return small.getvalue()


def speed_plot(figures: Sequence[Figure], device: str) -> Any:
    """Each figure's best peer over fused (a bar), and eager and torch.compile over fused (dots)."""
    plot = _new(9.0, 1.0 + 0.19 * len(figures))
    axes = plot.subplots()
    bars = [(k, best(f)[1] - 1.0) for k, f in enumerate(figures)]
    faster, slower = [b for b in bars if b[1] >= 0.0], [b for b in bars if b[1] < 0.0]
    for kind, colour, name in ((faster, _FUSED, "best peer"), (slower, _SLOWER, "best peer, which is faster")):
        if kind:
            axes.barh(*zip(*kind, strict=True), 0.7, left=1.0, color=colour, label=name)
    for name, colour in (("eager", _PLAIN), (COMPILED, _COMPILE)):
        if points := [(f["ratio"][name], k) for k, f in enumerate(figures) if name in f["ratio"]]:
            axes.plot(*zip(*points, strict=True), "o", ms=3, color=colour, label=name)
    axes.axvline(1.0, color="#5f6368", linewidth=0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(figures)), [title(f) for f in figures], fontsize=6)
    axes.set_ylim(len(figures) - 0.5, -0.5)  # the first on top
    axes.set_xlabel("time of the peer / time of fused; left of 1 fused is slower", fontsize=8)
    axes.set_title(device, fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    return plot


def parity_plot(curves: dict[str, Figure]) -> Any:
    """Losses of each system, plain and fused."""
    plot = _new(3.2 * len(curves), 2.6)
    for axes, (system, found) in zip(plot.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for side, colour in (("plain", _PLAIN), ("fused", _FUSED)):
            axes.plot(range(1, len(found[side]) + 1), found[side], lw=1.0, color=colour, label=side)
        axes.set_title(f"{system}{', red' if failures(found) else ''}", fontsize=8)
        axes.set_xlabel("step", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)
    return plot
