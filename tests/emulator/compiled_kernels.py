"""Triton kernels on the emulated GPU. test_kernels.py runs this file, in a process in which Triton compiles."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from bench import compile_gate, emulate, limits, mutations, predict
from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.emulator.findings import KernelFault, Kind
from genai_fast.emulator.ptx import Unsupported
from genai_fast.kernels.common import moments_triton
from genai_fast.registry import OPS
from genai_fast.testing import assert_matches_reference, emulated_gpu

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90)


@triton.jit
def _double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, BLOCK)
    c = tl.zeros([M, M], tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=3):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k[:, None]) * M + m[None, :])
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * M + m[None, :], c)


@triton.jit
def _total(x_ptr, partial_ptr, count_ptr, y_ptr, BLOCK: tl.constexpr, ORDER: tl.constexpr):
    program, offs = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(partial_ptr + program * BLOCK + offs, tl.load(x_ptr + program * BLOCK + offs))
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem=ORDER) == tl.num_programs(0) - 1:  # the last one adds
        total = tl.zeros([BLOCK], tl.float32)
        for k in range(tl.num_programs(0)):
            total += tl.load(partial_ptr + k * BLOCK + offs)
        tl.store(y_ptr + offs, total)


_tuned = triton.autotune([triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 512})], key=["n"])(_double)


@triton.jit
def _printing(x_ptr):
    tl.device_print("x", tl.load(x_ptr))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_users_kernel_runs_and_is_reported(arch):
    x, y = torch.randn(1000), torch.empty(1000)
    with emulated_gpu(arch) as gpu:
        _double[(4,)](x, y, 1000, BLOCK=256)
    assert torch.equal(y, 2 * x)
    (record,) = gpu.records
    assert record.programs == 4 and not record.findings
    assert record.footprint == (4000 + 24, 4000 + 24) or record.footprint == (4000, 4000)
    heading, line = gpu.report().splitlines()
    assert heading.startswith("kernel") and line.split()[:4] == ["_double", "4", "x", "128"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "precision", "limit"),
    [(torch.float32, "tf32", 2e-3), (torch.bfloat16, "ieee", 1e-5), (torch.float16, "ieee", 1e-5)],
)
def test_matrix_products(arch, dtype, precision, limit):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 128, generator=generator).to(dtype), torch.randn(128, 64, generator=generator).to(dtype)
    c = torch.empty(64, 64)
    with emulated_gpu(arch) as gpu:
        _product[(1,)](a, b, c, 128, M=64, BLOCK=32, PRECISION=precision)
    exact = a.double() @ b.double()
    assert float((c - exact).abs().max() / exact.abs().max()) < limit
    assert sum(gpu.records[0].flops().values()) == 2 * 64 * 64 * 128
    matrix = "wgmma" if arch == 90 else "mma.sync"
    assert any(s.name.startswith(matrix) for s in gpu.records[0].statements)


def test_ops_are_served_inside_and_nothing_is_left_behind():
    x, weight = torch.randn(4, 64), torch.ones(64)
    assert "emulated_gpu" in unavailable("triton", "cpu")
    with emulated_gpu() as gpu, use_backend("triton"):
        y = ops.layer_norm(x, weight)
    assert gpu.launches == 1
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,)))
    assert "emulated_gpu" in unavailable("triton", "cpu")
    with use_backend("triton"), pytest.raises(RuntimeError, match="Triton needs a CUDA device"):
        ops.layer_norm(x, weight)
    with emulated_gpu(), pytest.raises(ValueError, match="one at a time"), emulated_gpu():
        pass
    with pytest.raises(ValueError, match="arch must be one of 80, 90, got 70"):
        emulated_gpu(70)


def test_the_command_says_how_many_runs_are_right(monkeypatch, capsys):
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")
    assert emulate.main(["rotary", "--arch", "90", "--every", "12"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines and all(": right, " in line for line in lines)
    assert last == f"{len(lines)} of {len(lines)} runs right"
    monkeypatch.setattr(emulate, "assert_matches_reference", lambda run: [][1])
    assert emulate.main(["rotary", "--arch", "80", "--every", "30"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED sm_80 rotary-" in shown and "IndexError" in shown and " 0 of" in f" {shown.splitlines()[-1]}"


def test_changes_of_a_kernel_are_noticed():
    with emulated_gpu(90, budget=mutations.BUDGET) as gpu:
        outcome = mutations.mutate(mutations.runs(["layer_norm"]), gpu, each=2, verbose=False)
        record = gpu.records[-1]
    assert outcome.found["barrier removed"].keys() <= {"race", "fault", "changes nothing"}
    assert sum(outcome.found["barrier removed"].values()) >= 2
    assert outcome.found["global address 16 bytes on"]["missed"] == 0
    assert "noticed" in str(outcome) and {place.kind for place in outcome.unnoticed} <= {*mutations.KINDS}
    prediction = predict.predict(record, predict.MACHINES["H100"])
    assert prediction.seconds["memory"] == sum(record.footprint) / 3.35e12
    assert prediction.total == prediction.seconds[prediction.limiter] + predict.LAUNCH


@pytest.mark.parametrize("op", ["layer_norm", "causal_attention"])
def test_a_barrier_that_nothing_needs_may_be_left_out(op):
    """What is taken for a change of nothing is never noticed; and what is needed, always."""
    with emulated_gpu(90, budget=mutations.BUDGET) as gpu:
        run = next(r for r in mutations.runs([op]) if r.case.name == "gpt")
        places, bits = mutations.places_of(run, gpu)
        barriers = [p for p in places if p.kind in mutations.NEEDED]
        verdicts = {(p.needed, mutations.verdict(p, gpu, bits)) for p in barriers}
    assert {verdict for needed, verdict in verdicts if not needed} <= {"missed"}
    assert {verdict for needed, verdict in verdicts if needed} <= {"race", "fault", "warning", "numerics"}


def test_a_transposed_store_passes_the_limits(tmp_path, monkeypatch):
    op, module = OPS["gated_act"], importlib.import_module("genai_fast.kernels.gated_act.triton_kernel")
    right, wrong = "tl.store(y_ptr + row * columns + column", "tl.store(y_ptr + row + rows * column"
    worse = broken_copy("gated_act", tmp_path, right, wrong)
    with emulated_gpu(limits.ARCH) as gpu:
        assert list(limits.violations(op, *limits.launches(op, gpu))) == []
        monkeypatch.setattr(module, "_gated_act_forward", worse._gated_act_forward)
        wrong = "\n".join(limits.violations(op, *limits.launches(op, gpu)))
    assert re.search(
        r"gated_act: _gated_act_forward \(launch 1 of \d\): sectors over .*: expected at most 1.05, got", wrong
    )


def test_narrow_programs_pass_the_limits(monkeypatch, capsys):
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")
    assert emulate.main(["rotary", "--limits"]) == 0
    monkeypatch.setattr(importlib.import_module("genai_fast.kernels.rotary.triton_kernel"), "PAIRS", 32)
    assert emulate.main(["rotary", "--limits"]) == 1
    shown = capsys.readouterr().out
    assert re.search(
        r"FAILED rotary: _rotary \(launch 1 of 2\): instructions of threads an element: expected at", shown
    )


def test_every_op_with_triton_kernels_has_limits():
    assert [op.name for op in OPS.values() if "triton" in op.backends and op.limits is None] == []


def test_autotune_takes_the_fewest_instructions():
    x, y = torch.randn(500), torch.empty(500)
    with emulated_gpu() as gpu:
        _tuned[lambda meta: (triton.cdiv(500, meta["BLOCK"]),)](x, y, 500)
    assert torch.equal(y, 2 * x)
    assert [r.programs for r in gpu.records] == [16, 1, 1]  # each configuration, then the better one


def test_a_call_of_a_function_is_not_implemented():
    with emulated_gpu(), pytest.raises(Unsupported, match="_printing"):
        _printing[(1,)](torch.zeros(1))


def test_what_is_certainly_wrong_raises_or_is_reported():
    tensors = torch.randn(512), torch.empty(512), torch.zeros(1, dtype=torch.int32), torch.empty(128)
    with emulated_gpu(strict=False) as gpu:
        _total[(4,)](*tensors, BLOCK=128, ORDER="relaxed")
    assert {f.kind for f in gpu.records[0].findings} == {Kind.GLOBAL_READ_AFTER_WRITE}
    assert "FAULT: _total: race in global memory between two programs" in gpu.report()


def test_the_example_of_the_page_runs(tmp_path):
    page = (ROOT / "genai_fast" / "emulator" / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    example = tmp_path / "example.py"  # Triton reads a kernel's source from its file
    example.write_text(block)
    spec = importlib.util.spec_from_file_location("example", example)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    example.write_text(block.replace(", mask=offs < n), mask", "), mask"))
    with pytest.raises(KernelFault) as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    shown = " ".join(page.partition("KernelFault: ")[2].split("; in")[0].split())
    assert str(error.value).startswith(shown)


# Five kernels, each broken in one place.


def broken_copy(folder, tmp_path, right, wrong):
    """The module of a copy of kernels/<folder>/triton_kernel.py with one edit."""
    source = ROOT / "kernels" / folder / "triton_kernel.py"
    assert source.read_text().count(right) == 1
    copy = tmp_path / "broken_triton_kernel.py"
    copy.write_text(source.read_text().replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken_triton_kernel", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_named(gpu, op, case, dtype):
    """A run of the numerics gate by its name."""
    (run,) = [r for r in emulate.triton_runs([op]) if (r.op.name, str(r.case), r.dtype) == (op, case, dtype)]
    gpu.records.clear()
    assert_matches_reference(run)


def test_a_missing_mask_is_caught(tmp_path):
    right, wrong = "tl.load(x_ptr + both, mask=mask, other=0.0)", "tl.load(x_ptr + both)"
    module = broken_copy("rotary", tmp_path, right, wrong)
    x, cos = torch.randn(1, 1, 3, 8), torch.randn(3, 4)
    with emulated_gpu(), pytest.raises(KernelFault) as error:
        module.rotary(x, cos, cos, None, 0, True, False)
    found = str(error.value)
    assert re.search(r"_rotary: program .* out of bounds: read of \d+ bytes at offset \d+ of x_ptr \(float32 ", found)
    assert re.search(r"in `ld\.global.*` of broken_triton_kernel\.py:\d+", found)


def test_a_wrong_stride_is_caught(tmp_path):
    right, wrong = "tl.store(y_ptr + row * columns + column", "tl.store(y_ptr + row * (columns - 1) + column"
    module = broken_copy("gated_act", tmp_path, right, wrong)
    with emulated_gpu() as gpu, pytest.raises(KernelFault, match="_gated_act_forward: race in global memory") as error:
        module.gated_act(*torch.randn(2, 40, 96).unbind(), None, "silu", 1.0, 1.0)
    assert "two writes" in str(error.value) and "y_ptr (float32 [40, 96])" in str(error.value)
    assert gpu.launches == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_missing_barrier_is_caught(arch):
    with emulated_gpu(arch) as gpu:
        run_named(gpu, "layer_norm", "gpt", torch.bfloat16)
        gpu.change = lambda ptx: re.sub(r"bar\.sync[^;]*;", "", ptx)
        with pytest.raises(KernelFault, match=r"race in shared memory between two warps: .* without a barrier"):
            run_named(gpu, "layer_norm", "gpt", torch.bfloat16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_wrong_wait_is_caught(arch):
    a, c = torch.ones(64, 256).bfloat16(), torch.empty(64, 64)
    with emulated_gpu(arch) as gpu:
        _product[(1,)](a, a.t().contiguous(), c, 256, M=64, BLOCK=32, PRECISION="ieee")
        waits = re.compile(r"cp\.async\.wait_group\s+(\d+)")
        gpu.change = lambda ptx: waits.sub(lambda m: f"cp.async.wait_group {int(m[1]) + 1}", ptx)
        with pytest.raises(KernelFault, match=r"_product: .* of what a cp\.async writes that was not waited for"):
            _product[(1,)](a, a.t().contiguous(), c, 256, M=64, BLOCK=32, PRECISION="ieee")


def test_a_result_that_was_not_waited_for_is_caught():
    a, c = torch.ones(64, 32).bfloat16(), torch.empty(64, 64)
    with emulated_gpu(90) as gpu:
        gpu.change = lambda ptx: re.sub(r"(wgmma\.wait_group\S+)\s+\d", r"\1 7", ptx)
        with pytest.raises(KernelFault, match=r"_product: .* uses the result of a wgmma that was not waited for"):
            _product[(1,)](a, a.t().contiguous(), c, 32, M=64, BLOCK=32, PRECISION="ieee")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_wrong_release_is_caught(arch):
    with emulated_gpu(arch) as gpu:
        run_named(gpu, "gru", "many_rows", torch.bfloat16)
        assert {r.kernel for r in gpu.records if r.programs > 1} >= {"_gru_sequence", "_gru_sequence_backward"}
        gpu.change = lambda ptx: ptx.replace(".release.add", ".relaxed.add")
        with pytest.raises(KernelFault, match=r"_gru_sequence: race in global memory between two programs: .*release"):
            run_named(gpu, "gru", "many_rows", torch.bfloat16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_once(arch):
    """The fewest runs of the numerics gate that launch every kernel; a warning would need an explanation."""
    with emulated_gpu(arch) as gpu:
        chosen = emulate.sample(emulate.triton_runs())
        result = emulate.emulate(chosen, gpu, verbose=False)
        launched = {r.kernel for r in gpu.records}
    assert result.runs == len(chosen) > 15
    assert not result.wrong and not result.warnings, str(result)
    table = next(iter(sorted(compile_gate.TABLES.glob("*.json"))))
    committed = {name.split("/")[1] for name in json.loads(table.read_text())}
    missing = {f"_{name}" for name in committed} - launched
    assert missing <= {"_merge_moments"}, (
        "kernels that no case of the numerics gate launches"
    )  # of large tensors: below
    assert {op.folder for op in OPS.values() if "triton" in op.backends} == {run.op.folder for run in chosen}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_moments_are_merged(arch):
    groups, channels = moments_triton.MOST_GROUPS + 5, 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 8, channels, generator=generator, dtype=torch.float64) + 3
    counts, means = torch.full((groups, channels), 8.0), x.mean(1)
    partial = torch.stack([counts, means.float(), (x - means[:, None]).square().sum(1).float()])
    with emulated_gpu(arch) as gpu:
        mean, squares, _ = moments_triton.combine_moments(partial, None, None, 8 * groups, 0.1, 1e-5)
    assert [r.kernel for r in gpu.records] == ["_merge_moments", "_combine_moments"]
    torch.testing.assert_close(mean.double(), x.mean((0, 1)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares.double(), (x - x.mean((0, 1))).square().sum((0, 1)), rtol=1e-5, atol=1e-5)
