"""The compile gate: the committed table holds, and each kind of regression makes it fail."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compile_gate, sass
from genai_fast.kernels.common.spec import CompileCase

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def _scale(x_ptr, y_ptr, count, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, offs < count) * FACTOR, offs < count)

@triton.jit
def _spill(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x * tl.sum(x))

@triton.jit
def _loop(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(x_ptr + offs, offs < count))
    tl.store(y_ptr + tl.arange(0, BLOCK), total)

@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        c = tl.dot(tl.load(a_ptr + k * BLOCK + rows), tl.load(b_ptr + k * BLOCK + rows), c)
    tl.store(c_ptr + rows, c)
"""

VECTORS = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
MATRICES = {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32", "K": "i32", "BLOCK": 64}
SCALE = {**VECTORS, "count": "i32", "FACTOR": 2.0, "BLOCK": 1024}
CASES = {
    case.name: case
    for case in (
        CompileCase("scale", "_scale", SCALE, elements=1024, max_instructions_per_element=20, wide_loads=True),
        CompileCase(
            "unaligned", "_scale", {**SCALE, "x_ptr": "*fp32:4", "y_ptr": "*fp32:4"}, elements=1024, wide_loads=True
        ),
        CompileCase("no_pointer", "_scale", {**SCALE, "x_ptr": "fp32"}, elements=1024),
        CompileCase("spill", "_spill", {**VECTORS, "BLOCK": 16384}, num_warps=1),
        CompileCase("loop", "_loop", {**VECTORS, "count": "i32", "BLOCK": 512}, elements=512),
        CompileCase("matmul", "_matmul", MATRICES, tensor_cores=True),
    )
}

# Compiles the cases and prints their table.
DRIVER = """
import json, pathlib, sys
import genai_fast.kernels
from bench import compile_gate
from genai_fast.kernels.common.spec import CompileCase

folder = pathlib.Path(sys.argv[1])
genai_fast.kernels.__path__.append(str(folder))
cases = json.loads((folder / "cases.json").read_text())
jobs = [compile_gate.Job("toy", CompileCase(**case), 90) for case in cases]
print(json.dumps(compile_gate.measure(jobs, folder / "cache")))
"""


def python(*arguments, **environment):
    """A process of its own, since this one may interpret."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    variables.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**variables, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder in which `compiled` compiles."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "toy").mkdir()
    (folder / "toy" / "triton_kernel.py").write_text(KERNELS)
    (folder / "driver.py").write_text(DRIVER)
    return folder


def compiled(folder, cases):
    (folder / "cases.json").write_text(json.dumps([vars(case) for case in cases]))
    done = python(folder / "driver.py", folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(toy):
    return compiled(toy, CASES.values())


@pytest.fixture
def table(measured):
    """The toy kernels' rows, to be changed at will."""
    return copy.deepcopy(measured)


def name(case):
    return f"toy/{case}/sm_90"


def wrong(table, case, committed=None):
    job = compile_gate.Job("toy", CASES[case], 90)
    return compile_gate.violations([job], {str(job): table[str(job)]}, committed)


def test_committed_table_holds():
    """Of every kernel in one case; `make gate` compiles all cases."""
    done = python("-m", "bench.compile_gate", "--check", "--once", "--arch", "80", "90")
    assert done.returncode == 0, done.stdout + done.stderr


def test_once_leaves_no_kernel_out():
    every = compile_gate.jobs((80, 90))
    part = compile_gate.once(every)
    kernels = lambda found: {(job.folder, job.case.kernel, job.arch) for job in found}  # noqa: E731
    assert kernels(part) == kernels(every) and len(part) == len(kernels(every))


def test_every_case_is_compiled_for_every_architecture():
    """Where one has a tile of its own, its case stands in for the other's."""
    found = {}
    for job in compile_gate.jobs(compile_gate.ARCHITECTURES):
        assert job.arch in (job.case.architectures or (job.arch,)), str(job)
        found.setdefault((job.folder, job.case.name), []).append(job.arch)
    wrong = {name: got for name, got in found.items() if sorted(got) != sorted(compile_gate.ARCHITECTURES)}
    assert not wrong
    tiles = {job.case.num_stages for job in compile_gate.jobs((80, 90)) if job.case.name == "grad_keys-64-bf16"}
    assert len(tiles) == 2


def test_a_part_makes_nothing_stale(table):
    jobs = [compile_gate.Job("toy", case, 90) for case in CASES.values()]
    assert compile_gate.violations(jobs[:1], {name("scale"): table[name("scale")]}, table, jobs) == []


def test_interpreting_process_is_refused():
    done = python("-m", "bench.compile_gate", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stdout


def test_straight_line_kernel(table):
    assert wrong(table, "scale") == []
    row = table[name("scale")]
    assert row["spill_bytes"] == row["local_accesses"] == row["loop_instructions"] == 0
    assert row["tensor_cores"] == {}
    assert 0 < row["registers"] <= 255
    # 16-byte loads and stores serve four elements each: a few instructions an element, not dozens.
    assert 1 < row["instructions_per_element"] < 20
    assert row["instructions_per_element"] == round(row["instructions"] * 128 / 1024, 2)


def test_divisibility_is_part_of_the_type(table):
    assert table[name("unaligned")]["instructions"] > table[name("scale")]["instructions"]


def test_a_loop_is_found(table):
    assert 0 < table[name("loop")]["loop_instructions"] < table[name("loop")]["instructions"]
    assert table[name("matmul")]["loop_instructions"] > 0


@pytest.mark.parametrize("hint", ["", "   ?trans6"], ids=["plain", "scheduling hints"])
def test_machine_code_is_read(hint):
    """A loop with one rare branch behind the kernel's end; then padding."""
    lines = ["MOV R1, 0x20", "LDL.LU R2, [R1]", "@P1 BRA 0x0060", "@!P0 BRA 0x0010", "EXIT", "BRA 0x0050"]
    lines += ["BRA 0x0030", "NOP"]
    code = "".join(f"        /*{16 * i:04x}*/    {line}{hint} ;   /* 0x00 */\n" for i, line in enumerate(lines))
    program = sass._parse(code)
    assert [i.name for i in program][:3] == ["MOV", "LDL.LU", "BRA"]
    assert sum(i.counts for i in program) == 6  # neither the jump to itself nor NOP
    assert sass._largest_loop(program) == 4


def test_spill_fails(table):
    (message,) = wrong(table, "spill")
    assert message.startswith("toy/spill/sm_90: spills: expected 0 bytes")


def test_matrix_instructions_that_are_not_there_fail(table):
    assert set(table[name("matmul")]["tensor_cores"]) == {"HGMMA"}
    assert wrong(table, "matmul") == []
    table[name("matmul")]["tensor_cores"] = {}
    (message,) = wrong(table, "matmul")
    assert "matrix instructions: expected some, got none" in message


def test_limit_of_instructions_fails(table):
    table[name("scale")]["instructions_per_element"] = 20.01
    (message,) = wrong(table, "scale")
    assert "instructions an element: expected at most 20, got 20.01" in message


def test_narrow_loads_fail_where_wide_ones_are_asked_for(table):
    (message,) = wrong(table, "unaligned")
    assert message.startswith("toy/unaligned/sm_90: loads of 16 bytes: expected some, got none")


def test_what_does_not_compile_is_said(table):
    assert "DOES NOT COMPILE" in compile_gate.render(table)
    (message,) = wrong(table, "no_pointer")
    assert "toy/no_pointer/sm_90: expected it to compile, got CompilationError" in message


REGRESSIONS = {
    "instructions": (lambda row: row.update(instructions=row["instructions"] * 2), "instructions: expected at most"),
    "loop": (lambda row: row.update(loop_instructions=row["loop_instructions"] * 2), "loop_instructions: expected"),
    "element": (lambda row: row.update(instructions_per_element=99), r"instructions_per_element: expected"),
    "registers": (lambda row: row.update(registers=255), "occupancy: expected 64 resident warps"),
    "shared": (lambda row: row.update(shared_bytes=200000), "occupancy: expected 64 resident warps"),
    "wide loads": (lambda row: row.update(wide_loads=-1), "loads of 16 bytes: expected"),
}


@pytest.mark.parametrize("regression", REGRESSIONS)
def test_regression_fails_and_names_the_remedy(table, regression):
    committed = copy.deepcopy(table)
    assert wrong(table, "loop", {name("loop"): committed[name("loop")]}) == []
    change, expected = REGRESSIONS[regression]
    change(table[name("loop")])
    (message,) = wrong(table, "loop", {name("loop"): committed[name("loop")]})
    assert message.startswith(f"toy/loop/sm_90: {expected}")
    assert message.endswith("python -m bench.compile_gate --update")


def test_a_register_more_at_the_same_occupancy_passes(table):
    committed = {name("scale"): copy.deepcopy(table[name("scale")])}
    table[name("scale")]["registers"] = 32  # 64 warps x 32 threads x 32 registers are all that there are
    assert wrong(table, "scale", committed) == []


def test_lost_matrix_instruction_fails(table):
    committed = {name("matmul"): copy.deepcopy(table[name("matmul")])}
    table[name("matmul")]["tensor_cores"] = {"HMMA": 64}
    (message,) = wrong(table, "matmul", committed)
    assert "matrix instructions: expected HGMMA, got HMMA" in message


def test_new_and_stale_cases_fail(table):
    messages = wrong(table, "scale", {name("loop"): table[name("loop")]})
    assert [m.split(":")[0] for m in messages] == [name("scale"), name("loop")]
    assert all("--update" in m for m in messages)


def test_results_are_kept_by_source(toy, measured):
    kept = set((toy / "cache").iterdir())
    assert len(kept) == len(CASES) - sum("error" in row for row in measured.values())
    for file in kept:  # shows where a result is read instead of compiled
        file.write_text(file.read_text().replace('"registers": ', '"registers": 1000'))
    kernels = toy / "toy" / "triton_kernel.py"
    kernels.write_text(KERNELS.replace("* FACTOR", "* FACTOR + 1.0"))
    again = compiled(toy, [CASES["scale"], CASES["matmul"]])
    assert again[name("matmul")]["registers"] > 1000
    assert again[name("scale")]["registers"] < 1000
    assert again[name("scale")]["instructions"] > measured[name("scale")]["instructions"]


def test_wrong_signature_is_refused(toy):
    case = CompileCase("scale", "_scale", {k: v for k, v in SCALE.items() if k != "count"})
    with pytest.raises(AssertionError, match="differ in: count"):
        compiled(toy, [case])


def _abort_at_loop(job):
    if job.case.name == "loop":
        os._exit(6)
    return {"error": "fine"}


def test_a_compiler_that_aborts_stops_nobody_else(monkeypatch):
    monkeypatch.setattr(compile_gate, "_compile", _abort_at_loop)
    jobs = [compile_gate.Job("toy", case, 90) for case in CASES.values()]
    usages = {job.case.name: usage["error"] for job, usage in compile_gate._compile_apart(jobs)}
    assert usages == {**dict.fromkeys(CASES, "fine"), "loop": "the compiler aborted"}


def test_update_writes_what_check_reads(table, tmp_path, monkeypatch, capsys):
    table = {name("scale"): table[name("scale")]}
    monkeypatch.setattr(compile_gate, "interpreting", lambda: False)
    monkeypatch.setattr(compile_gate, "jobs", lambda archs: [compile_gate.Job("toy", CASES["scale"], 90)])
    monkeypatch.setattr(compile_gate, "measure", lambda todo, cache: copy.deepcopy(table))
    arguments = ["--arch", "90", "--tables", str(tmp_path)]
    assert compile_gate.main([*arguments, "--check"]) == 2
    assert "--update" in capsys.readouterr().out
    file = tmp_path / f"triton-{triton.__version__}.json"
    file.write_text(json.dumps({"toy/other/sm_80": {}}))
    assert compile_gate.main([*arguments, "--update"]) == 0
    assert json.loads(file.read_text()) == {**table, "toy/other/sm_80": {}}  # the other architecture is kept
    assert compile_gate.main([*arguments, "--check"]) == 0
    table[name("scale")]["instructions"] *= 2
    assert compile_gate.main([*arguments, "--check"]) == 1
