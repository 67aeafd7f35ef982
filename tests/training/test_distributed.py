"""Two gloo processes train as one does on the joined batch: every kind of model, checkpoints both ways, torchrun."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_cases as cases
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from commands import records

from genai_fast import ops
from genai_fast.errors import UsageError
from genai_fast.fusion import thresholds
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.ops import rows
from genai_fast.training import checkpoint, distributed

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.filterwarnings("ignore::genai_fast.data.DataWarning"),  # texts are cut
]


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process in one/, of two in two/; begun by one and ended by two in one-then-two/, and the reverse."""
    folder, threads = tmp_path_factory.mktemp("distributed"), torch.get_num_threads()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="processes: 2 then, 1 now"),
        thresholds.ignored(),
    ):
        patch.setenv("GENAI_FAST_CACHE", str(folder / "cache"))
        patch.setenv("GENAI_FAST_DETERMINISTIC", "1")  # numbers of whole runs are compared, whatever their batches
        patch.chdir(folder)
        cases.prepare(folder)
        for name in cases.RUNS.keys() - cases.SHARDED.keys():
            cases.train(name, folder / "one")
        for name in cases.GO_ON:
            cases.without_the_last(folder / "one" / cases.SHARDED.get(name, name), folder / "one-then-two" / name)
        mp.spawn(cases.in_a_process, (str(folder), _port()), nprocs=2)
        for name in cases.GO_ON:
            cases.without_the_last(folder / "two" / name, folder / "two-then-one" / name)
            cases.train(name, folder / "two-then-one", resume=True)
    torch.set_num_threads(threads)
    return folder


def _numbers(run):
    """[(kind, step, {losses and figures})] of a run."""
    found = []
    for record in records(run):
        figures = {k: x for k, x in record.items() if not k.endswith("_per_second") and isinstance(x, float)}
        for part in ("train", "validation"):
            figures |= {f"{part} {name}": x for name, x in record.get(part, {}).items()}
        figures.pop("data_wait")
        found.append((record["kind"], record["step"], figures))
    return found


def _assert_same(run, expected, tolerance=1e-4, validation=1e-4):
    a, b = _numbers(run), _numbers(expected)
    assert [x[:2] for x in a] == [x[:2] for x in b] and len(a) > 2
    for (kind, step, found), (_, _, wanted) in zip(a, b, strict=True):
        assert found.keys() == wanted.keys() and len(found) > 0
        for name, x in wanted.items():
            allowed = validation if name.startswith("validation") else tolerance
            assert found[name] == pytest.approx(x, rel=allowed, abs=allowed), (run, kind, step, name)


@pytest.mark.parametrize("name", cases.SAME)
def test_two_processes_train_as_one_on_the_joined_batch(folder, name):
    # A convolution's bias before batch norm has no gradient but rounding, which Adam makes steps of: only running
    # statistics show it.
    tolerances = (1e-5, 2e-2) if name == "conv-vae" else (1e-4, 1e-4)
    _assert_same(folder / "two" / name, folder / "one" / name, *tolerances)


@pytest.mark.parametrize("name", cases.SHARDED)
def test_fully_sharded_too(folder, name):
    _assert_same(folder / "two" / name, folder / "one" / cases.SHARDED[name])


def test_each_process_has_a_history_of_its_own(folder):
    for name, count, size in (("history", 20, 20), ("cyclegan", 48, 96)):  # three steps of 16 images in each
        tensors = safetensors.torch.load_file(checkpoint.latest(folder / "two" / name) / "training.safetensors")
        for to in "ab":
            assert tensors[f"carried.{to}.count"].tolist() == [[count, count]]
            assert tensors[f"carried.{to}.images"].shape == (size, 2, 1, 28, 28)
            first, second = tensors[f"carried.{to}.images"].unbind(1)
            assert not torch.equal(first, second)


def test_what_may_differ_is_close(folder):
    _assert_same(folder / "two" / "bfloat16", folder / "one" / "bfloat16", 1e-2, 1e-2)
    _assert_same(folder / "two" / "vrnn", folder / "one" / "vrnn", 5e-2, 5e-2)  # other noise
    with pytest.raises(AssertionError):  # batch norm of each process by itself is another computation
        _assert_same(folder / "two" / "local-bn", folder / "one" / "local-bn")


@pytest.mark.parametrize("name", cases.GO_ON)
@pytest.mark.parametrize("way", ["one-then-two", "two-then-one"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(folder, name, way):
    _assert_same(folder / way / name, folder / "one" / cases.SHARDED.get(name, name))


def test_one_process_writes_and_all_have_the_same_weights(folder):
    for name in cases.RUNS.keys() - cases.SHARDED.keys():
        runs = [folder / count / name for count in ("one", "two")]
        one, two = ({str(path.relative_to(run)) for path in run.rglob("*")} for run in runs)
        assert one == two
    (first, _), (second, _) = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == cases.RUNS.keys() - cases.SHARDED.keys() - {"bfloat16"}
    for name, weights in first.items():
        assert all(torch.equal(x, second[name][key]) for key, x in weights.items()), name


def test_nan_and_signals_of_one_process_are_those_of_all(folder):
    (_, (skipped, said, weights)), (_, other) = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert skipped == other[0] == 2 and said == other[1]
    assert "stopped by SIGTERM after step 5 (epoch 1) with a checkpoint" in said
    assert all(torch.equal(x, other[2][key]) and x.isfinite().all() for key, x in weights.items())


@pytest.fixture
def process(monkeypatch):
    """process(rank, size): be one of so many, who do not speak with one another."""

    def be(rank, size):
        monkeypatch.setattr(distributed, "size", lambda: size)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)

    return be


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_row_is_one_process_own(process, size, parts):
    for each in range(1, 20):
        batch = torch.arange(each * parts).view(parts, each)
        seen = []
        for rank in range(size):
            process(rank, size)
            chosen = batch.flatten()[distributed.chooser(parts)(batch.numel())].view(parts, -1)
            assert chosen.size(1) >= 1
            with distributed.sharing(each):
                if not rows.mine().idle:
                    assert rows.mine().count == chosen.size(1) and rows.mine().before == len(seen)
                    seen += chosen[0].tolist()
            assert torch.equal(chosen - chosen[0], (torch.arange(parts) * each)[:, None].expand_as(chosen))
        assert seen == list(range(each))


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: ops.reparameterize(torch.zeros(n, 3), torch.zeros(n, 3)),
        lambda n: ops.act_dropout(torch.ones(n, 2, 5), 0.5, True, "none"),
        lambda n: ops.causal_attention(*torch.ones(3, n, 2, 4, 8), dropout=0.5),
        lambda n: rows.drawn(lambda m: torch.randn(m, 20), n),
        lambda n: rows.drawn(lambda m: torch.randn(m, 20), n // 2),  # of one of two equal parts
    ],
    ids=["reparameterize", "act_dropout", "causal_attention", "randn", "part"],
)
def test_each_process_draws_the_noise_of_its_rows(process, draw):
    torch.manual_seed(3)
    whole = draw(12)
    after = torch.rand(1)
    parts = []
    for rank in range(3):
        process(rank, 3)
        torch.manual_seed(3)
        with distributed.sharing(12):
            parts.append(draw(4))
        assert torch.equal(torch.rand(1), after)
    assert torch.equal(torch.cat(parts), whole) and whole.unique().numel() > 1


@pytest.mark.parametrize(("change", "settings", "message"), [
    ({"MASTER_PORT": None}, {}, r"WORLD_SIZE=2: expected MASTER_PORT too, as torchrun sets them; remedy: torchrun"),
    ({}, {"batch_size": 9}, r"--batch-size: expected a multiple of the 2 processes .* got 9; remedy: --batch-size 10"),
    ({}, {"device": "cuda:1"}, r"device: expected auto, cpu or cuda, .* got 'cuda:1'"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_waits(monkeypatch, change, settings, message):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                 "MASTER_PORT": "1", **change}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), distributed.processes(VAEConfig(**settings)):
        pass
    assert not dist.is_initialized()


def _torchrun(*arguments):
    # Behind "--", or torchrun takes --run for an abbreviation of its own --run-path.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *launcher, "-m", "--", "genai_fast", *arguments]
    source = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _workers(process):
    return (Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children").read_text().split()


def _until(condition, process):
    end = time.monotonic() + 180
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to find torchrun's processes")
def test_torchrun_restarts_stops_with_a_checkpoint_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or the second start finds the first one's addresses
    cases.prepare(tmp_path)
    settings = ["--data", "small.npz", "--hidden", "8", "--latent", "2", "--batch-size", "64"]
    run = tmp_path / "runs" / "job"
    # A job's command, the same each time it is started: there is no run yet.
    process = _torchrun("train", "vae", *settings, "--epochs", "1000000", "--run", run.name, "--resume")
    _until(lambda: checkpoint.found(run), process)
    before = _workers(process)
    os.kill(int(before[1]), signal.SIGKILL)
    reached = []
    _until(lambda: not set(_workers(process)) & set(before) and reached.append(checkpoint.latest(run)) is None, process)
    _until(lambda: checkpoint.latest(run) > reached[0], process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    assert process.returncode and said.count("stopped by SIGTERM after step") == 1, said
    stopped = checkpoint.read_state(checkpoint.latest(run))
    assert stopped["step"] > int(reached[0].name[-9:]) and records(run)[-1]["step"] <= stopped["step"]

    epochs = stopped["progress"]["epoch"] + 1
    process = _torchrun("train", "vae", "--run", run.name, "--resume", "--epochs", str(epochs))
    out, said = process.communicate(timeout=180)
    assert process.returncode == 0 and out.count(": on held-out data:\n  loss ") == 1, said
    found = [r for r in records(run) if r["kind"] == "epoch"]
    assert [(r["epoch"], r["step"]) for r in found] == [(k, 9 * k) for k in range(1, epochs + 1)]
