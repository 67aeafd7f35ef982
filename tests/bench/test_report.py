"""What bench.report makes of measurements: a table of one run, the page of one GPU, the README's headline."""

import copy
import json
import math
import subprocess
from pathlib import Path

import pytest

from bench import points
from bench.bench_layers import SUBJECTS
from bench.gpu_gate import decoding, training
from bench.report import __main__ as report
from bench.report import files, headline, page, plots
from genai_fast.profiling.systems import SYSTEMS

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tests" / "records" / "sample.json"

# The table of one run

VARIANTS = {
    "eager": {"wall_us": 30.0, "peak_bytes": 3 << 20},
    "compile": {"skipped": "no compiler"},
    "fused": {"wall_us": 10.0, "peak_bytes": 2 << 20},
}
FIGURE = {"op": "vae_loss", "case": "mnist", "dtype": "float32", "device": "cpu", "variants": VARIANTS}
FIGURE |= {"ratio": {"eager": 3.0}, "gigabytes_per_second": 12.34, "share_of_roof": 0.5, "foreign_load": 0.8}
ON_DEVICE = {
    **FIGURE,
    "device": "cuda",
    "variants": {
        "eager": {"wall_us": 90.0, "device_us": 8.0, "device_clock": "graph"},
        "compile": {"wall_us": 50.0, "device_us": 6.0, "device_clock": "graph"},
        "fused": {"wall_us": 40.0, "device_us": 2.0, "device_clock": "graph"},
    },
    "ratio": {"eager": 4.0, "compile": 3.0},
}
MACHINE = {"device": "a processor", "roofs": {"bytes_per_second": 4e10, "float32": 1e11}}


CASE, RATE, NO_RATE = "vae_loss mnist float32", {"GB/s": "12.34", "of roof": "50%"}, {"GB/s": "-", "of roof": "-"}


def ratios(of_variant, of_best="-"):
    return {"time / fused": of_variant, "best peer / fused": of_best}


def cells_of(text):
    """The rows of the first table, by the column's name."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *found = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in found]


def test_plot_has_a_bar_for_each_best_peer():
    slow = {**FIGURE, "ratio": {"eager": 0.5}}
    (axes,) = plots.speed_plot([FIGURE, ON_DEVICE, slow], "a processor").axes
    lengths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert lengths == {"best peer": [2.0, 2.0], "best peer, which is faster": [-0.5]}
    dots = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert dots["eager"] == [3.0, 4.0, 0.5] and dots["compile"] == [3.0]


# The page of one GPU


def sample(**changes):
    return {**json.loads(SAMPLE.read_text()), **changes}


def measured(**changes):
    """What a gate might have written here: no sample, of a device that is named for this test."""
    content = sample(**changes)
    del content["sample"], content["comment"]
    content["environment"]["device"] = "device of this test"
    return content


def with_failure(content, stage, task, message="wrong by 1\nand a second line"):
    content = copy.deepcopy(content)
    content[stage][task] = {"failures": {"numerics": message}}
    return {**content, "green": False}


def made(folder, *contents):
    """The page's text, of these records in that folder."""
    for k, content in enumerate(contents):
        files.write_json(folder / f"{k}.json", content)
    assert report.main([str(folder)]) == 0
    return (folder / "README.md").read_text()


def section(text, name):
    return next((part for part in text.split("\n## ") if part.startswith(f"{name}\n")), "")


def rows(text, name):
    return cells_of(section(text, name))


RATIOS = ("time / fused", "best peer / fused")


def test_page_of_a_green_record(tmp_path):
    text = made(tmp_path, measured())
    assert "the gate is green" in text and "\n> " not in text
    for said in ("- driver: 0.0", "- power_limit_watts: 100 W", "- torch: 2.0", "- roof, copy: 1000.0 GB/s"):
        assert said in text
    ops = {(row["case"].split()[0], row["variant"]): row for row in rows(text, "Ops")}
    assert ops["reparameterize_kl", "fused"] == {
        "case": "reparameterize_kl vae_wide-4096x512 float32", "variant": "fused", "ms": "0.200", "device ms": "0.100",
        "MiB": "2.0", "GB/s": "500", "GFLOP/s": "10", "of roof": "50%", **ratios("-", "2.00"),
    }  # fmt: skip
    peers = {key: row["time / fused"] for key, row in ops.items() if key[1] != "fused"}
    assert peers == {
        ("cross_entropy", "eager"): "2.00", ("cross_entropy", "compile"): "**0.500 slower**",
        ("reparameterize_kl", "eager"): "3.00", ("reparameterize_kl", "compile"): "2.00",
        ("vae_loss", "eager"): "4.00", ("vae_loss", "eager (logits)"): "2.00",
    }  # fmt: skip
    assert ops["cross_entropy", "fused"]["best peer / fused"] == "**0.500 slower**"
    assert section(text, "Where the fused path is slower").split("\n\n")[1].splitlines() == [
        "- cross_entropy gpt2-512x50257 bfloat16: 0.500 against compile",
        "- training step of gpt_nano float32: 0.500 against compile",
    ]
    steps = [row for row in rows(text, "Training steps") if "mlp_vae" in row["case"]]
    assert [s["variant"] for s in steps] == ["eager", "compile", "compile reduce-overhead", "fused"]
    assert (steps[-1]["ms"], steps[-1]["device ms"], steps[-1]["launches"]) == ("1.000", "0.500", "10")
    *_, gpt = (row for row in rows(text, "Training steps") if "gpt_nano" in row["case"])
    assert (gpt["tokens/s"], gpt["device ms"]) == ("500000", "-")
    (path,) = rows(text, "The implementation of each convolution")
    assert (path["implementation"], path["why"]) == ("kernel", "2.00 x torch")
    assert (path["kernel us"], path["torch us"]) == ("100", "200")
    *_, compiled, written = rows(text, "Decoding")
    assert (compiled["ms"], compiled["tokens/s"], compiled["time / fused"]) == ("0.500", "-", "2.00")
    assert (written["ms"], written["sampled ms"], written["tokens/s"]) == ("0.250", "0.500", "4000")
    assert (written["GB/s"], written["of roof"]) == ("1000", "50%")
    (kept,) = rows(text, "Tuning")
    assert kept["settings"] == "BLOCK 1024, num_warps 4" and "1 (less than 3% faster)" in section(text, "Tuning")
    notes = section(text, "Notes")
    assert "compile was skipped: made up: no compiler" in notes and "0.5 processors busy" in notes
    for image in page.IMAGES:
        assert f"({image})" in text and (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    assert not section(text, "Other records") and page.SAMPLE not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: with_failure(c, "runs", "vae_loss-odd-float32"), "> - vae_loss-odd-float32: `numerics"),
        (lambda c: with_failure(c, "training", "gpt_nano"), "> - gpt_nano: `numerics: wrong by 1`"),
        (lambda c: {**c, "runs": {**c["runs"], "gru-a": {"died": "no end after 5 s"}}}, "> - gru-a: `died: no end"),
        (lambda c: {**c, "memory_check": {"passed": False, "output": "\nout of bounds\n"}}, "memory_check: `out of"),
        (lambda c: with_failure(c, "figures", "gru-a", "x\ny"), "> - gru-a: `numerics: x`"),
        (lambda c: {**c, "errors": {"tuning": "OSError: x\ny"}}, "> - stage tuning: `OSError: x`"),
        (lambda c: {**c, "green": False}, "does not say what is wrong"),
    ],
    ids=["numerics", "training", "died", "memory", "refused", "stage", "no reason"],
)
def test_no_speed_up_without_a_green_gate(tmp_path, change, said):
    """Whatever the record says of itself; nor do the bars of a former page stay."""
    made(tmp_path, measured())
    text = made(tmp_path, change(measured()))
    banner, _, rest = text.partition("\n- commit ")
    assert "**The gate is red**" in banner and said in banner and "second line" not in text
    assert "the gate is red" in rest.splitlines()[0]
    assert rows(text, "Ops")[0]["ms"] == "0.800" and rows(text, "Training steps")[0]["ms"]
    assert rows(text, "Decoding")[0]["ms"]
    assert not any(name in text for name in (*RATIOS, "slower", "of roof"))
    assert {path.name for path in tmp_path.iterdir()} == {"0.json", "README.md", "parity.png"}


def test_a_long_list_of_failures_names_every_op(tmp_path):
    content = measured()
    for k in range(50):
        content = with_failure(content, "runs", f"op{k:02}-case")
    text = made(tmp_path, content)
    assert "op00, op01" in text and "op49." in text and "> - and 10 more" in text


def test_a_gate_that_is_not_through_says_what_is_left(tmp_path):
    left = {"runs": [f"gru-{k}" for k in range(20)], "checks": ["memory_check"]}
    content = measured(green=False, through=False, left=left)
    text = made(tmp_path, content)
    banner = text.partition("\n- commit ")[0]
    assert "**The gate is not through**" in banner and "red" not in banner.replace("measured", "")
    assert "> - runs: gru-0, gru-1, " in banner and "gru-11 and 8 more" in banner
    assert "> - checks: memory_check" in banner
    assert not any(name in text for name in (*RATIOS, "speed.png"))


def test_the_newest_that_is_through_is_shown_and_the_others_listed(tmp_path):
    old = measured(date="2000-01-01T00:00:00+00:00", commit="old", minutes=7.6)
    newer = measured(date="2000-01-03T00:00:00+00:00", commit="newer", green=False, through=False)
    red = with_failure(measured(date="1999-12-31T00:00:00+00:00", commit="red"), "runs", "gru-a")
    text = made(tmp_path, old, newer, measured(commit="shown", minutes=None), red)
    assert "- commit shown, 2000-01-02" in text
    assert [list(row.values()) for row in rows(text, "Other records")] == [
        ["2000-01-03", "newer", "not through", "10"],
        ["2000-01-01", "old", "green", "8"],
        ["1999-12-31", "red", "red", "10"],
    ]
    assert "time / fused" in rows(text, "Ops")[0]


def test_page_without_the_optional_parts(tmp_path):
    content, point = measured(), "reparameterize_kl-vae_wide-4096x512-float32-cuda"
    optional = "training decoding tuning parity large barrier_check minutes foreign_load dirty"
    content["figures"] = {point: content["figures"][point]}
    for name in optional.split():
        del content[name]
    (figure,) = content["figures"].values()
    figure["variants"] = {name: {"wall_us": v["wall_us"]} for name, v in figure["variants"].items()}
    for name in ("gigabytes_per_second", "gigaflops_per_second", "share_of_roof", "foreign_load", "backend"):
        del figure[name]
    del content["environment"]["roofs"]
    text = made(tmp_path, content)
    *_, row = rows(text, "Ops")
    assert set(row) == {"case", "variant", "ms", *RATIOS} and row["ms"] == "0.200"
    assert not any(section(text, name) for name in ("Training steps", "Decoding", "Tuning", "Training curves", "Notes"))
    assert "Nowhere in what was measured." in section(text, "Where the fused path is slower")
    assert {path.name for path in tmp_path.iterdir()} == {"0.json", "README.md", "speed.png"}
    empty = {**content, "figures": {}, "runs": {}, "green": False, "through": False}
    assert "Nothing was measured." in made(tmp_path, empty)


def test_parity_curves_may_hold_nan(tmp_path):
    content = measured()
    content["parity"]["mlp_vae"] |= {"fused": [math.nan] * 50, "failures": {"parity": "got nan"}}
    text = made(tmp_path, content)
    assert "mlp_vae: `parity: got nan`" in text and "(parity.png)" in text


def test_uncommitted_changes_are_named(tmp_path):
    assert "> **Measured with uncommitted changes:**" in made(tmp_path, measured(dirty=True))


def test_a_sample_says_that_it_is_one(tmp_path):
    content = sample()
    assert content["sample"] is True and content["environment"]["device"] == "sample GPU (no such device)"
    text = made(tmp_path, content)
    assert text.splitlines()[4] == f"> **{page.SAMPLE}**"


def first(content):
    return next(iter(content["figures"].values()))


def damaged(change):
    content = measured()
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda: json.dumps(measured())[:-50], "cut off"),
        (lambda: json.dumps([1]), "got a file without"),
        (lambda: damaged(lambda c: c.pop("commit")), "commit missing"),
        (lambda: damaged(lambda c: c.update(green="yes")), "green: expected bool"),
        (lambda: damaged(lambda c: c["environment"].pop("device")), "environment: device missing"),
        (lambda: damaged(lambda c: c["runs"].update(a=1)), "runs: a: expected dict"),
        (lambda: damaged(lambda c: c["figures"].update(x={"op": "gru"})), "x: case, device, dtype, ratio, variants"),
        (lambda: damaged(lambda c: first(c)["variants"].pop("fused")), "variants: fused missing"),
        (lambda: damaged(lambda c: first(c)["ratio"].update(eager=None)), "ratio: eager: expected int | float"),
        (lambda: damaged(lambda c: c["training"].update(x={"batch": 1})), "training: x: ratio, system, variants"),
    ],
)
def test_a_damaged_record_is_named_and_nothing_is_written(tmp_path, capsys, text, message):
    (tmp_path / "bad.json").write_text(text())
    arguments = [str(tmp_path / "bad.json"), "--out", str(tmp_path / "out")]
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report: {tmp_path / 'bad.json'}") and message in error
    files.write_json(tmp_path / "good.json", measured())  # nor beside a good one
    assert report.main([str(tmp_path)]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"bad.json", "good.json"}


def test_records_that_make_no_page_are_refused(tmp_path, capsys):
    def said(*arguments):
        assert report.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "got no .json in" in said(tmp_path / "empty")
    one, other = measured(), measured()
    other["environment"]["device"] = "another device"
    for name, content in (("a/one", one), ("a/other", other), ("b/one", one)):
        files.write_json(tmp_path / f"{name}.json", content)
    assert "expected records of one GPU, got another device" in said(tmp_path / "a")
    assert "expected records of one folder" in said(tmp_path / "a" / "one.json", tmp_path / "b" / "one.json")
    (tmp_path / "b" / "README.md").write_text("somebody's")
    assert "got another's, which is kept" in said(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "somebody's"


# The headline


def test_the_readme_shows_what_was_measured():
    text = (ROOT / "README.md").read_text()
    shown = text.split(f"{headline.BEGIN}\n")[1].split(f"\n{headline.END}")[0]
    # What `make bench` wrote here since is for its author to commit, or not.
    command = ["git", "ls-files", "bench/results/*.json"]
    committed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    expected = headline.headline(ROOT / "bench" / "results", [ROOT / name for name in committed])
    assert shown == expected, "run: python -m bench.report --headline bench/results README.md"


def test_the_headline_is_of_cases_that_the_gate_measures():
    known = {(p.op.name, p.case.name, p.precision) for p in points.points("cuda")}
    assert set(headline.OPS) <= known and set(headline.TRAINING) <= set(training.MEASURED)
    assert set(headline.DECODING) <= set(decoding.MEASURED)
    here = {(p.op.name, p.case.name) for p in points.points("cpu")}
    assert {case for case in headline.CPU_OPS if not case[0].startswith("fuse")} <= here
    assert {c for op, c in headline.CPU_OPS if op == "fuse, training"} <= {f"{s.model}-{s.layout}" for s in SUBJECTS}
    assert set(headline.CPU_TRAINING) <= set(SYSTEMS)


def test_headline_before_any_gpu(tmp_path, capsys):
    said = headline.headline(tmp_path)
    assert said.startswith("No GPU has been measured yet") and "python -m bench.gpu_gate" in said and "\n" not in said
    files.write_json(tmp_path / "sample" / "a.json", sample())
    assert headline.headline(tmp_path) == said
    assert "a.json: left out: a made-up sample" in capsys.readouterr().err


def test_headline_of_the_newest_green_record_of_each_gpu(tmp_path, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(f"before\n{headline.BEGIN}\nold\n{headline.END}\nbehind\n")
    other = measured(green=False)
    other["environment"]["device"] = "other device"
    for name, content in {
        "a/1": measured(date="2000-01-01T00:00:00+00:00", commit="older"),
        "a/2": measured(commit="chosen"),
        "a/3": measured(date="2000-01-03T00:00:00+00:00", commit="dirty", dirty=True),
        "a/4": with_failure(measured(date="2000-01-04T00:00:00+00:00", commit="red"), "runs", "gru-a"),
        "b/1": other,
    }.items():
        files.write_json(results / f"{name}.json", content)
    assert report.main(["--headline", str(results), str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{headline.BEGIN}\n**device of this test**, 2000-01-02, commit chosen")
    assert text.endswith(f"{headline.END}\nbehind\n") and "a newer gate, 2000-01-04, commit red: red" in text
    first, second = text.split("**other device**")
    assert "| reparameterize_kl vae_wide-4096x512 float32 | 0.100 | 0.300 | 0.200 | 3.00 | 2.00 |" in first
    assert "| training step of gpt_nano float32 | 2.000 | 4.000 | 1.000 | 2.00 | **0.500 slower** |" in first
    assert "| decoding gpt2_bfloat16 bfloat16 | 0.250 | 4.000 | 0.500 | 16.00 | 2.00 |" in first
    assert "| causal_attention 16x16x1024x64 bfloat16 | - | - | - | - | - |" in first  # not measured, not hidden
    assert "Of 6 figures, fused is slower than the best peer in 2: cross_entropy" in first
    assert "no green gate on a commit yet" in second and "|" not in second
    assert report.main(["--headline", str(results)]) == 0
    assert capsys.readouterr().out in text
    assert report.main(["--headline", str(tmp_path / "none"), str(readme)]) == 2
    (results / "a" / "2.json").write_text("{")
    assert report.main(["--headline", str(results), str(readme)]) == 2
    assert readme.read_text() == text
