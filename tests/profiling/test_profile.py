"""`genai-fast profile`: a stranger's loop and a recipe, from the command line to the files; and mistakes."""

import json

import pytest
import torch
from PIL import Image

from genai_fast.cli.parser import main
from genai_fast.models import GPT
from genai_fast.profiling import generation, machine, measure, sweep

SCRIPT = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader

class Slow:
    def __len__(self):
        return 8

    def __getitem__(self, k):
        time.sleep(0.02)
        return torch.ones(5), k % 3

def train(steps=10**9):
    model = nn.Linear(5, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    done = 0
    while done < steps:
        for x, y in DataLoader(Slow(), batch_size=4):
            nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
            done += 1
            print("a word")
            yield len(x)

def short():
    return train(8)

def ends():
    return train(24)

def compared(prepare, batch=6):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 1))
    model = prepare(model)
    adam = torch.optim.Adam(model.parameters())
    x = torch.randn(batch, 2, 8, 8)

    def step():
        adam.zero_grad()
        model(x).sum().backward()
        adam.step()

    return step, batch

def replaced(prepare):
    model = nn.Linear(5, 3)
    model.forward = model.forward
    prepare(model)
    return lambda: model(torch.ones(2, 5)).sum().backward()

def compiled():
    run = torch.compile(nn.Linear(5, 3), backend="eager")
    return lambda: run(torch.ones(2, 5)).sum().backward()

def wrong():
    raise ValueError("no luck")

def number():
    return 3

def asks(x):
    return lambda: None

def sized(batch):
    return lambda: None
"""
FILES = {"profile.json", "profile.txt", "profile.png"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 64)
    (tmp_path / "mine.py").write_text(SCRIPT)
    return tmp_path


def call(*arguments):
    try:
        return main(["profile", *arguments])
    except SystemExit as stop:
        return stop.code


def test_a_loop_that_waits_for_its_data_is_told_so(here, capsys):
    assert call("mine.py:train", "--seconds", "0.2") == 0
    said = capsys.readouterr().out
    assert "waiting for data takes" in said and "num_workers" in said and "a word" not in said
    folder = here / "profile-train"
    assert {p.name for p in folder.iterdir()} == FILES | {"trace-loop.json", "trace-tuned.json"}
    assert (folder / "profile.txt").read_text().strip() in said
    found = json.loads((folder / "profile.json").read_text())
    loop = found["variants"]["loop"]
    assert "tuned" in found["variants"] and "threads" in found["tuned"] and "under genai_fast.tune_cpu()" in said
    assert loop["unit"] == "samples" and 0.5 < loop["data_wait"] <= 1.0
    # Two steps' worth of samples a loader, however fast: a rate of samples is four times that of steps.
    assert loop["per_second"] == pytest.approx(4 * loop["steps"] / sum(loop["timeline"]), rel=0.2)
    assert loop["flops"] == 2 * 4 * 5 * 3 * 2  # forward, and the weight's gradient
    assert loop["step_seconds"]["p50"] <= loop["step_seconds"]["p95"] <= loop["step_seconds"]["max"]
    assert loop["joules"] is None and found["energy"] == "energy: unknown on a CPU"
    assert found["environment"]["torch"] == torch.__version__ and found["device"] == "cpu"
    assert {"name", "calls", "own_seconds", "share"} <= loop["operators"][0].keys()
    events = json.loads((folder / "trace-loop.json").read_text())["traceEvents"]
    assert any(event["name"] == "aten::addmm" for event in events)
    with Image.open(folder / "profile.png") as picture:
        assert picture.size[0] > 500


def test_variants_of_a_loop_with_prepare(here, capsys, small_is_fused):
    arguments = ["mine.py:compared", "--compare", "eager,fused", "--seconds", "0.1", "--batch", "5", "--json"]
    assert call(*arguments, "--out", "p") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((here / "p" / "profile.json").read_text())
    eager, fused = (found["variants"][name] for name in ("eager", "fused"))
    assert eager["flops"] == fused["flops"] == 2 * 5 * (36 * 4 * 18 * 2 + 36 * 4 * 4 * 3)
    names = {name: {o["name"] for o in v["operators"]} for name, v in found["variants"].items()}
    assert "aten::native_batch_norm" in names["eager"] - names["fused"]
    assert found["peak"]["precision"] == "float32" and eager["arithmetic"] == {"float32": 1.0}
    assert [eager["convolutions"], eager["convolutions_not_channels_last"]] == [2, 2]
    assert call(*arguments, "--out", "p") == 2
    assert "--out: expected a new or empty folder, got p" in capsys.readouterr().err


def test_batches_have_a_knee(here, capsys):
    assert call("mine.py:compared", "--batch", "2,8,16", "--compare", "eager,fused", "--seconds", "0.1") == 0
    said, folder = capsys.readouterr().out, here / "profile-compared"
    found = json.loads((folder / "profile.json").read_text())
    assert [*found["batches"]] == ["2", "8", "16"] and found["knee"].keys() == {"eager", "fused"}
    for name, at in found["knee"].items():
        speeds = {int(batch): one["variants"][name]["per_second"] for batch, one in found["batches"].items()}
        assert at == min(batch for batch, speed in speeds.items() if speed >= 0.9 * max(speeds.values()))
        assert f"knee of {name}: " in said
    assert (folder / "profile.txt").read_text().strip() in said and "what to change (fused, batch " in said
    assert {p.name for p in folder.iterdir()} == FILES | {"batch-2", "batch-8", "batch-16"}
    assert {p.name for p in (folder / "batch-8").iterdir()} == {"trace-eager.json", "trace-fused.json"}
    assert sweep.knee({1: 10.0, 2: 19.0, 4: 30.0, 8: 33.0, 16: 31.0}) == 4


def test_generation_has_latencies(here, capsys, monkeypatch):
    monkeypatch.setattr(generation, "_model", lambda name: GPT(11, block=8, layers=1, heads=1, width=8))
    assert call("gpt", "--generate", "--batch", "1,3", "--seconds", "0.05", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "tokens" and found["what"] == "4 tokens after a prompt of 4, the likeliest each"
    for one in found["batches"].values():
        assert 0 < one["first_seconds"]["p50"] <= one["first_seconds"]["p95"] and one["calls"] >= 3
        assert 0 < one["seconds"]["p50"] <= one["seconds"]["p95"] < 1
    monkeypatch.undo()
    assert call("vae", "--generate", "--batch", "2", "--seconds", "0.05", "--out", str(here / "images")) == 0
    assert "images/s" in capsys.readouterr().out and (here / "images" / "profile.json").exists()


def test_a_variant_that_fails_is_reported_beside_the_others(here, capsys):
    assert call("mine.py:replaced", "--compare", "eager,compile", "--seconds", "0.05") == 0
    said = capsys.readouterr().out
    assert "compile: failed: TypeError: prepare: expected a model whose forward is its class's" in said
    assert "steps/s" in said
    found = json.loads((here / "profile-replaced" / "profile.json").read_text())
    assert found["variants"]["compile"].keys() == {"failed"} and found["variants"]["eager"]["steps"] > 0


def test_what_a_loop_compiles_itself_is_not_said_to_be_counted(here, capsys):
    assert call("mine.py:compiled", "--seconds", "0.05") == 0
    assert "FLOP not counted of: what torch.compile compiled" in capsys.readouterr().out


def test_a_recipe_with_real_data(here, capsys):
    arguments = ["vae", "--data", "digits", "--batch", "8", "--precision", "bf16", "--seconds", "0.05"]
    assert call(*arguments) == 0
    found = json.loads((here / "profile-vae" / "profile.json").read_text())
    for variant in ("eager", "fused"):
        v = found["variants"][variant]
        assert 0 < v["data_wait"] < 1 and v["unit"] == "samples" and v["steps"] >= measure.LEAST
        assert v["flops"] == 2 * 8 * (784 * 400 * 2 + 400 * 20 * 2 * 3 + 20 * 400 * 3 + 400 * 784 * 3)
    assert found["peak"]["precision"] == "bfloat16"
    said = capsys.readouterr().out  # measured as `train` runs it
    assert found["tune_cpu"].startswith("freed memory kept") and f"tune_cpu: {found['tune_cpu']}\n" in said
    assert "genai_fast.tune_cpu()" not in said
    assert call("vae", "--data", "none.npy") == 2
    assert not (here / "profile-vae-2").exists()


def test_a_loop_that_ends(here, capsys):
    assert call("mine.py:short", "--seconds", "0.1") == 2
    said = capsys.readouterr().err
    assert "the loop ended after 8 steps; remedy: more steps in it" in said
    assert call("mine.py:ends", "--seconds", "60") == 0
    assert "loop: the loop ended after 24 steps" in capsys.readouterr().out
    assert [p.name for p in here.iterdir() if p.is_dir() and p.name != "__pycache__"] == ["profile-ends"]


MISTAKES = {
    "recipe": (["dgan"], "did you mean dcgan"),
    "nothing like it": (["resnet50-zzz"], "expected one of vae,"),
    "file": (["none.py:train"], "none.py: no such file"),
    "module": (["no_such_module:train"], "cannot be imported"),
    "function": (["mine.py:trian"], "expected 'trian' in mine.py to be a class or function"),
    "raises": (["mine.py:wrong"], "wrong: loop: ValueError: no luck"),
    "returns": (["mine.py:number"], "got int 3; remedy: return the step function"),
    "asks": (["mine.py:asks"], "without arguments but for prepare, batch, device, got x"),
    "no batch": (["mine.py:sized"], "--batch: mine.py:sized asks for it"),
    "batch": (["vae", "--batch", "0"], "--batch: expected numbers from 1 on, each once, got 0"),
    "batches": (["vae", "--batch", "8,8"], "--batch: expected numbers from 1 on, each once, got 8,8"),
    "no number": (["vae", "--batch", "8,all"], "--batch: expected a number, or several as 16,32,64, got '8,all'"),
    "tuned alone": (["mine.py:compared", "--compare", "tuned"], "remedy: --compare fused,tuned"),
    "tuned recipe": (["vae", "--compare", "eager,tuned"], "tuned: a recipe runs under tune_cpu already"),
    "generates": (["srresnet", "--generate"], "expected a model that writes on, or draws images or sounds of noise"),
    "generates data": (["vae", "--generate", "--data", "mnist"], "--data: --generate has no use for it"),
    "no run": (["none", "--generate"], "with --generate expected a recipe or the folder of a run, got 'none'"),
    "its batch": (["mine.py:train", "--batch", "3"], "mine.py:train takes no `batch`"),
    "its precision": (["mine.py:train", "--precision", "bf16"], "mine.py:train takes no `prepare`"),
    "its data": (["mine.py:train", "--data", "mnist"], "--data: mine.py:train has its own"),
    "seconds": (["vae", "--seconds", "0"], "--seconds: expected a number > 0, got 0"),
    "compare": (["mine.py:train", "--compare", "eager,fused"], "takes no `prepare`; remedy"),
    "variant": (
        ["vae", "--compare", "eager,fast"],
        "--compare: expected some of eager,compile,fused,tuned, got 'fast'",
    ),
    "twice": (["vae", "--compare", "eager,eager"], "--compare: expected each variant once"),
    "device": (["vae", "--device", "tpu9"], "device: expected one that works here"),
    "out": (["vae", "--out", "no/such/folder"], "--out: no/such/folder: expected a folder that can be made"),
    "out is a file": (["vae", "--out", "mine.py"], "--out: expected a new or empty folder, got mine.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(here, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err.splitlines()[-1]
    assert ("Traceback" in said.err) == (mistake == "raises")
    assert {p.name for p in here.iterdir()} <= {"mine.py", "__pycache__"}
