"""The page of one GPU: README.md and its plots, from the records that the GPU gate wrote there.

Speed-ups are shown only if the gate is green on the commit that was measured.
"""

from collections import Counter
from collections.abc import Sequence

from bench.report import plots, records
from bench.report.records import CHECKS, Record, failures, first_line
from bench.report.tables import BUSY, cell, cells, machine_lines, notes, slower, table
from genai_fast.autotune import Choice
from genai_fast.cli.tune import table as choices

SAMPLE = "made-up sample record: these are not measurements"
PAGE, MARK = "README.md", "<!-- made by python -m bench.report -->"
IMAGES = SPEED, TRAINING, PARITY = "speed.png", "training.png", "parity.png"
_MOST = 40  # failures that are listed

Lines = list[str]


def page(found: Sequence[Record]) -> dict[str, bytes]:
    """File name -> content, from the records of one GPU, newest first: shows the newest that is through."""
    shown = next((record for record in found if record.through), found[0])
    images = _images(shown)

    def measured(stage: str, words: str, image: str = "") -> Lines:
        figures = shown.figures(stage)
        header, *rows = cells(figures, shown.green)
        picture = ["", f"![speed of {stage}]({image})"] if image in images else []
        return [*table(header, *rows), "", words, *picture] if rows else []

    device = "Forward and backward; ratios are of device time if it was measured: medians of interleaved runs."
    others = [[r.day, r.commit, r.verdict, cell(r.content, "minutes", "{:.0f}")] for r in found if r is not shown]
    behind = [f"- {what}: {ratio:.3f} against {peer}" for what, peer, ratio in slower(shown.figures())]
    failed = [(point, why) for point, r in shown.content["figures"].items() for why in failures(r).values()]
    sections = {
        "Ops": measured("figures", device, SPEED) or ["Nothing was measured."],
        "Where the fused path is slower": (behind or ["Nowhere in what was measured."]) if shown.green else [],
        "Training steps": measured("training", "Ratios are of a step's wall time.", TRAINING),
        "The implementation of each convolution": _paths(shown),
        "Decoding": measured("decoding", "Wall time per token, greedy; sampled: temperature, top-k and top-p."),
        "Tuning": _tuning(shown),
        "Training curves": [f"![losses, plain and fused]({PARITY})"] if PARITY in images else [],
        "No figure": [f"- {point}: {_code(why)}" for point, why in failed],
        "Notes": [f"- {note}" for note in _notes(shown)],
        "Other records": table(["date", "commit", "gate", "minutes"], *others) if others else [],
    }
    parts = [[MARK, "", f"# {shown.device}"], _banner(shown), _head(shown)]
    parts += [[f"## {name}", "", *lines] for name, lines in sections.items() if lines]
    return {**images, PAGE: ("\n\n".join("\n".join(part) for part in parts if part) + "\n").encode()}


def _banner(record: Record) -> Lines:
    blocks: list[Lines] = []
    if record.sample:
        blocks.append([f"**{SAMPLE}**"])
    if record.content.get("dirty"):
        blocks.append(["**Measured with uncommitted changes:** these figures belong to no commit."])
    if wrong := record.wrong():
        ops = ", ".join(sorted({task.partition("-")[0] for task, _ in wrong}))
        blocks.append([f"**The gate is red**, so no speed-up is shown. Wrong: {ops}.", ""])
        blocks[-1] += [f"- {task}: {_code(why)}" for task, why in wrong[:_MOST]]
        blocks[-1] += [f"- and {len(wrong) - _MOST} more"] if len(wrong) > _MOST else []
    elif record.through and not record.green:
        blocks.append(["**The gate is red**, so no speed-up is shown; the record does not say what is wrong."])
    if not record.through:
        blocks.append(["**The gate is not through**, so no speed-up is shown. Not reached:", ""])
        blocks[-1] += [f"- {what}" for what in record.not_reached() or ["the record does not say what"]]
    return [f"> {line}".rstrip() for k, block in enumerate(blocks) for line in ([""] if k else []) + block]


def _head(record: Record) -> Lines:
    content = record.content
    stages = ", ".join(f"{len(content[s])} {s}" for s in records.STAGES if content[s]) or "nothing done"
    lines = [f"- commit {record.commit}, {content['date']}: the gate is {record.verdict} ({stages})"]
    for name in CHECKS:
        if check := content[name]:
            skipped = f"skipped: {check['skipped']}" if "skipped" in check else "red"
            lines.append(f"- {name.replace('_', ' ')}: {'passed' if check.get('passed') else skipped}")
    return [*lines, *machine_lines(content["environment"])]


def _paths(record: Record) -> Lines:
    """Which implementation serves each convolution of the fused steps, and why."""
    paths = [f.get("paths", {}) for f in record.figures("training")]
    chosen = {key: Choice(**choice) for found in paths for key, choice in found.items()}
    return table(*choices(chosen)) if chosen else []


def _tuning(record: Record) -> Lines:
    """The launches whose settings were changed, and why the others were not."""
    searched = [t for t in record.content["tuning"].values() if not failures(t)]
    columns = {"kernel": "{}", "case": "{}", "default_us": "{:.1f}", "best_us": "{:.1f}", "settings": _settings}
    rows = [[cell(t, *column) for column in columns.items()] for t in searched if t.get("kept")]
    lines = table(["kernel", "case", "default us", "best us", "settings"], *rows) if rows else []
    left = Counter(t.get("reason") or "no reason given" for t in searched if not t.get("kept"))
    why = ", ".join(f"{n} ({reason})" for reason, n in left.most_common())
    return lines + (["", f"Unchanged: {why}."] if left else [])


def _settings(settings: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _notes(record: Record) -> Lines:
    found = notes(record.figures())
    found += [f"not done yet: {names}" for names in record.not_reached()] if record.through else []
    if (busy := record.content.get("foreign_load") or 0.0) > BUSY:
        found.append(f"over the whole gate other programs kept {busy:.1f} processors busy")
    return found


def _code(text: str) -> str:
    return f"`{first_line(text).replace('`', chr(39))}`"


def _images(record: Record) -> dict[str, bytes]:
    """Bars only of a green record; curves of any, as they show what is wrong."""
    curves = {s: c for s, c in record.content["parity"].items() if c.get("plain") and c.get("fused")}
    found = {PARITY: plots.png(plots.parity_plot(curves))} if curves else {}
    for name, stage in ((SPEED, "figures"), (TRAINING, "training")) if record.green else ():
        if figures := [f for f in record.figures(stage) if f["ratio"]]:
            found[name] = plots.png(plots.speed_plot(figures, record.device))
    return found
