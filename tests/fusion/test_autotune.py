"""The choice of the fastest path: measured once, remembered, pinned where asked for; and layers that take one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from alike import assert_alike, assert_close, with_statistics
from torch import nn

from genai_fast import autotune, fuse
from genai_fast.fusion import implementations

pytestmark = pytest.mark.usefixtures("small_is_fused")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measured(monkeypatch, tmp_path):
    """A cache of its own, and nothing chosen yet."""
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "0")
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "cache"))
    autotune.forget()
    autotune._warn_once.cache_clear()
    yield
    autotune.forget()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each call is said to take: the call itself gives them."""
    monkeypatch.setattr(autotune, "_clock", lambda device, call: call())


def _open(made, taken_unmeasured, **seconds):
    """Paths that are said to take so long; `made` gets the names of those that are measured."""

    def maker(name):
        def make():
            made.append(name)
            return lambda: seconds[name]

        return make

    return lambda: ({name: maker(name) for name in seconds}, taken_unmeasured)


def test_the_fastest_is_taken_once_and_remembered(clock):
    made = []
    found = autotune.choose(("op",), (2, 3), CPU, _open(made, "slow", slow=3e-3, fast=1e-3))
    assert found == ("fast", {"slow": 3000.0, "fast": 1000.0}) and sorted(made) == ["fast", "slow"]
    assert autotune.choose(("op",), (2, 3), CPU, _open(made, "slow", slow=1e-3, fast=3e-3)) == found
    autotune.forget()  # as another process would
    assert autotune.choose(("op",), (2, 3), CPU, _open(made, "slow", slow=1e-3, fast=3e-3)) == found
    assert len(made) == 2
    ((machine, choices),) = autotune.remembered().items()
    assert choices == {"op": {(2, 3): found}} and f"torch {torch.__version__}" in machine
    assert autotune.choose(("op",), (2, 4), CPU, _open(made, "slow", slow=1e-3, fast=3e-3)).name == "slow"


def test_a_path_must_win_clearly(clock):
    assert autotune.choose(("near",), (2,), CPU, _open([], "usual", usual=1.00e-3, other=0.99e-3)).name == "usual"


@pytest.mark.parametrize("how", ["environment", "torch", "only_remembered"])
def test_pinned_takes_the_fixed_path_and_measures_nothing(clock, monkeypatch, how):
    made = []
    open_paths = _open(made, "fixed", fixed=3e-3, other=1e-3)
    if how == "environment":
        monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")
        found = autotune.choose(("op",), (2,), CPU, open_paths)
    elif how == "torch":
        torch.use_deterministic_algorithms(True)
        try:
            found = autotune.choose(("op",), (2,), CPU, open_paths)
        finally:
            torch.use_deterministic_algorithms(False)
    else:
        with autotune.only_remembered():
            found = autotune.choose(("op",), (2,), CPU, open_paths)
    assert found.name == "fixed" and not made and not autotune.file().exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "[" * 200_000, '{"version": 2}', '{"version": 2, "machines": {"m": {"k": 3}}}']
)
def test_a_damaged_file_is_replaced_and_said(clock, content):
    autotune.file().parent.mkdir()
    autotune.file().write_text(content)
    with pytest.warns(autotune.AutotuneWarning, match=r"autotune\.json: is damaged"):
        assert autotune.choose(("op",), (2,), CPU, _open([], "a", a=1e-3, b=2e-3)).name == "a"
    assert json.loads(autotune.file().read_text())["version"] == autotune.VERSION


def test_another_versions_file_is_not_read(clock):
    autotune.choose(("op",), (2,), CPU, _open([], "a", a=2e-3, b=1e-3))
    content = json.loads(autotune.file().read_text())
    autotune.file().write_text(json.dumps({**content, "version": autotune.VERSION + 1}))
    autotune.forget()
    made = []
    assert autotune.choose(("op",), (2,), CPU, _open(made, "a", a=1e-3, b=2e-3)).name == "a" and len(made) == 2


def test_a_folder_that_cannot_be_written_is_said(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(autotune.AutotuneWarning, match="in this process only"):
        assert autotune.choose(("op",), (2,), CPU, _open([], "a", a=2e-3, b=1e-3)).name == "b"
    assert autotune.choose(("op",), (2,), CPU, _open([], "a", a=1e-3, b=2e-3)).name == "b"


def test_a_user_without_a_home_is_served_and_told(clock, monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("GENAI_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(autotune.Path, "home", none)
    with pytest.warns(autotune.AutotuneWarning, match="in this process only"):
        assert autotune.choose(("op",), (2,), CPU, _open([], "a", a=2e-3, b=1e-3)).name == "b"


def test_a_lock_that_is_never_released_is_not_waited_for(clock, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    autotune.file().parent.mkdir()
    monkeypatch.setattr(autotune, "_WAIT", 0.05)
    with open(autotune.file().with_suffix(".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(autotune.AutotuneWarning, match="held by another process"):
            assert autotune.choose(("op",), (2,), CPU, _open([], "a", a=2e-3, b=1e-3)).name == "b"
    assert autotune.remembered()


def test_a_link_among_the_caches_is_not_written_through(clock, tmp_path):
    """In a cache folder that several users share, another may have put it there."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    autotune.file().parent.mkdir()
    for name in (autotune.file().name, "autotune.new", "paths.new"):
        (autotune.file().parent / name).symlink_to(victim)
    with pytest.warns(autotune.AutotuneWarning, match="is damaged"):
        autotune.choose(("op",), (2,), CPU, _open([], "a", a=2e-3, b=1e-3))
    assert victim.read_text() == "mine" and not autotune.file().is_symlink()
    assert autotune.remembered()


def test_processes_that_write_at_once_lose_nothing():
    code = (
        "import sys, torch; from genai_fast import autotune; autotune._clock = lambda device, call: call()\n"
        "for k in range(40): autotune.choose((sys.argv[1], k), (2,), torch.device('cpu'),"
        " lambda: ({'a': lambda: lambda: 1e-3, 'b': lambda: lambda: 2e-3}, 'a'))"
    )
    environment = {**os.environ, "GENAI_FAST_CACHE": str(autotune.file().parent)}
    running = [subprocess.Popen([sys.executable, "-c", code, name], env=environment) for name in ("one", "two")]
    assert [process.wait() for process in running] == [0, 0]
    ((_, choices),) = autotune.remembered().items()
    expected = {f"{name} {k}" for name in ("one", "two") for k in range(40)}
    assert {family for family, shapes in choices.items() if (2,) in shapes} == expected


# --- layers


def _generator():
    return nn.Sequential(
        nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.Sequential(nn.ConvTranspose2d(8, 5, 4, 2, 1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2)),
        nn.ConvTranspose2d(5, 3, 4, 2, 1),
        nn.Tanh(),
    )


class _View(nn.Module):
    """Works on contiguous tensors alone."""

    def forward(self, x):
        return x.view(x.size(0), -1)


def _critic():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12),
        nn.LeakyReLU(0.2, True), nn.Dropout(0.0), nn.Conv2d(12, 10, 4), nn.BatchNorm2d(10),
        nn.Tanh(), _View(), nn.Linear(10, 1),
    )  # fmt: skip


@pytest.fixture(params=["torch", "channels_last", "gemm", "im2col", "kernel"])
def path(request, monkeypatch):
    """One path for everything, where it is open."""

    def choose(family, shape, device, candidates):
        makers, default = candidates()
        taken.append(request.param if request.param in makers else default)
        for make in makers.values():
            make()()  # what would be measured runs
        return autotune.Choice(taken[-1], {})

    taken = []
    monkeypatch.setattr(autotune, "choose", choose)
    yield request.param
    assert request.param in taken


@pytest.mark.parametrize(
    ("make", "shape"), [(_generator, (4, 6, 1, 1)), (_critic, (4, 3, 16, 16))], ids=["generator", "critic"]
)
def test_every_path_computes_the_same(path, make, shape):
    torch.manual_seed(0)
    plain = with_statistics(make())
    fused = fuse(make())
    fused.load_state_dict(plain.state_dict())
    assert_alike(fused, plain, torch.randn(shape))


def test_an_outer_channels_last_input_stays_so():
    torch.manual_seed(0)
    plain, x = _generator().eval(), torch.randn(4, 6, 2, 2).contiguous(memory_format=torch.channels_last)
    fused = fuse(_generator().eval())
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        found, expected = fused(x), plain(x)
    assert_close(found, expected)
    assert found.stride() == expected.stride()


def test_measuring_leaves_no_trace():
    """Neither in the random stream, nor in running statistics and gradients, nor in the input."""
    results = []
    for value in ("1", "0"):
        os.environ["GENAI_FAST_DETERMINISTIC"] = value  # monkeypatch undoes it
        torch.manual_seed(0)
        model, x = fuse(_generator()), torch.randn(4, 6, 1, 1)
        y = model(x)
        y.sum().backward()
        results.append((torch.rand(3), y.detach(), *model.buffers(), *(p.grad for p in model.parameters())))
    assert len(autotune.remembered()) == 1
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
    assert torch.equal(results[0][0], results[1][0])
    for found, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert_close(found, expected, 1e-4, scale=max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("what", ["autocast", "inference", "no_grad", "frozen"])
def test_what_a_time_depends_on_is_in_the_key(what):
    model, x = fuse(_generator()), torch.randn(4, 6, 1, 1)
    model(x)
    before = len(next(iter(autotune.remembered().values())))
    if what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    elif what == "inference":
        with torch.inference_mode():
            model.eval()(x)
    elif what == "no_grad":
        with torch.no_grad():
            model(x)
    else:
        model.requires_grad_(False)(x.requires_grad_())
    assert len(next(iter(autotune.remembered().values()))) == before + 3


def test_the_layout_is_named():
    x = torch.randn(2, 3, 4, 5)
    assert implementations._layout(x) == "contiguous"
    assert implementations._layout(x.contiguous(memory_format=torch.channels_last)) == "channels_last"
    assert implementations._layout(x.transpose(2, 3)) == "strided"
