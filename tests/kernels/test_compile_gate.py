"""The compile gate: the committed table holds, and each kind of regression makes it fail."""

import ast
import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compile_gate, sass
from genai_fast.kernels.common.spec import Expected

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

LAUNCHES = {
    "scale": "_scale[(4,)](x, y, 4096, FACTOR=2.0, BLOCK=1024)",
    "unaligned": "_scale[(4,)](x[1:], y[1:], 4095, FACTOR=2.0, BLOCK=1024)",
    "no_pointer": "_scale[(4,)](1.0, y, 4096, FACTOR=2.0, BLOCK=1024)",
    "spill": "_spill[(1,)](x, y, BLOCK=16384, num_warps=1)",
    "loop": "_loop[(1,)](x, y, 4096, BLOCK=512)",
    "matmul": "_matmul[(1,)](x.half(), y.half(), x, 256, BLOCK=64)",
}
EXPECTED = {
    "scale": Expected((), lambda c: c["BLOCK"], 20),
    "unaligned": Expected((), lambda c: c["BLOCK"]),
    "loop": Expected(elements=lambda c: c["BLOCK"]),
    "matmul": Expected(tensor_cores=True),
}

# Records the launches and compiles them; what is recorded goes to a file, the table to stdout.
DRIVER = """
import json, pathlib, pickle, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import genai_fast.kernels
from bench import compile_gate
from bench.launches import recording

folder = pathlib.Path(sys.argv[1])
genai_fast.kernels.__path__.append(str(folder))
from genai_fast.kernels.toy import triton_kernel

found = {}
with FakeTensorMode():
    x, y = torch.empty(2, 4096)
    for name, code in json.loads(sys.argv[2]).items():
        with recording(90) as launches:
            exec(code, vars(triton_kernel) | {"x": x, "y": y})
        (found[name],) = launches
(folder / "launches").write_bytes(pickle.dumps(found))
blocks = compile_gate.Expected(elements=lambda c: c["BLOCK"])
jobs = [compile_gate.Job(f"toy/{n}", launch, 90, blocks) for n, launch in found.items()]
print(json.dumps(compile_gate.measure(jobs, folder / "cache")))
"""

# Of all kernels of the library.
RECORD = """
import json
from bench import compile_gate

every = compile_gate.jobs((80, 90))
for jobs in (every, compile_gate.once(every)):
    print(json.dumps([(j.launch.module, j.launch.kernel, j.arch, j.name, j.launch.options) for j in jobs]))
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


def compiled(folder, names):
    done = python(folder / "driver.py", folder, json.dumps({name: LAUNCHES[name] for name in names}))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(toy):
    return compiled(toy, LAUNCHES)


@pytest.fixture(scope="module")
def jobs(toy, measured):
    """One for each toy launch, by its name."""
    found = pickle.loads((toy / "launches").read_bytes())
    return {n: compile_gate.Job(f"toy/{n}", x, 90, EXPECTED.get(n, Expected())) for n, x in found.items()}


@pytest.fixture(scope="module")
def recorded():
    """(module, kernel, architecture, name, options) of every launch that is compiled, and of those of --once."""
    done = python("-c", RECORD)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def table(measured):
    """The toy kernels' rows, to be changed at will."""
    return copy.deepcopy(measured)


def name(case):
    return f"toy/{case}/sm_90"


@pytest.fixture
def wrong(jobs):
    def found(table, case, committed=None):
        job = jobs[case]
        return compile_gate.violations([job], {str(job): table[str(job)]}, committed)

    return found


def test_committed_table_holds():
    """Of every kernel as one case launches it on one architecture; `make gate` compiles all launches for four."""
    done = python("-m", "bench.compile_gate", "--check", "--once", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr


def entry_kernels():
    """Triton functions that no other one calls."""
    functions, called = set(), set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                functions.add(node.name)
                calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
                called |= {call.id for call in calls if isinstance(call, ast.Name)}
    return functions - called - {"_philox_words"}  # which only tests launch


def test_every_kernel_is_launched_by_some_case(recorded):
    every, once = recorded
    assert {kernel for _, kernel, *_ in every} == entry_kernels()
    kernels = [(module, kernel, arch) for module, kernel, arch, *_ in once]
    assert len(set(kernels)) == len(kernels) and set(kernels) == {(m, k, arch) for m, k, arch, *_ in every}


def test_launches_are_those_of_the_architecture(recorded):
    """Where one has a tile of its own, it is compiled for that tile."""
    stages = {
        arch: options["num_stages"]
        for _, kernel, arch, name, options in recorded[0]
        if kernel == "_causal_attention_grad_keys" and name.endswith("causal_attention-gpt_nano-16x6x256x64-bf16")
    }
    assert set(stages) == {80, 90} and stages[80] != stages[90]


def test_a_launch_is_recorded_as_triton_specialises_it(jobs):
    aligned, unaligned = jobs["scale"].launch, jobs["unaligned"].launch
    assert aligned.signature == {
        "x_ptr": "*fp32", "y_ptr": "*fp32", "count": "i32", "FACTOR": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    assert aligned.named_constants() == {"FACTOR": 2.0, "BLOCK": 1024}
    assert all(map(aligned.is_aligned, ("x_ptr", "y_ptr", "count", "BLOCK")))
    assert not any(map(unaligned.is_aligned, ("x_ptr", "y_ptr", "count")))
    assert jobs["spill"].launch.options["num_warps"] == 1


def test_a_part_makes_nothing_stale(table, jobs):
    every = list(jobs.values())
    assert compile_gate.violations(every[:1], {name("scale"): table[name("scale")]}, table, every) == []


def test_interpreting_process_is_refused():
    done = python("-m", "bench.compile_gate", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stdout


def test_straight_line_kernel(table, wrong):
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


def test_spill_fails(table, wrong):
    (message,) = wrong(table, "spill")
    assert message.startswith("toy/spill/sm_90: spills: expected 0 bytes")


@pytest.mark.parametrize(
    "registers, spilled, local, fine", [(80, 8, 2, True), (255, 8, 2, False), (80, 24, 6, False), (80, 0, 2, False)]
)
def test_a_few_bytes_may_be_spilled_with_registers_to_spare(table, wrong, registers, spilled, local, fine):
    table[name("matmul")] |= dict(registers=registers, spill_bytes=spilled, local_accesses=local)
    assert (wrong(table, "matmul") == []) == fine


def test_matrix_instructions_that_are_not_there_fail(table, wrong):
    assert set(table[name("matmul")]["tensor_cores"]) == {"HGMMA"}
    assert wrong(table, "matmul") == []
    table[name("matmul")]["tensor_cores"] = {}
    (message,) = wrong(table, "matmul")
    assert "matrix instructions: expected some, got none" in message


def test_limit_of_instructions_fails(table, wrong):
    table[name("scale")]["instructions_per_element"] = 20.01
    (message,) = wrong(table, "scale")
    assert "instructions per element: expected at most 20, got 20.01" in message


def test_narrow_loads_fail_where_wide_ones_are_asked_for(table, wrong):
    (message,) = wrong(table, "unaligned")
    assert message.startswith("toy/unaligned/sm_90: loads of 16 bytes: expected some, got none")


def test_what_does_not_compile_is_said(table, wrong):
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
def test_regression_fails_and_names_the_remedy(table, regression, wrong):
    committed = copy.deepcopy(table)
    assert wrong(table, "loop", {name("loop"): committed[name("loop")]}) == []
    change, expected = REGRESSIONS[regression]
    change(table[name("loop")])
    (message,) = wrong(table, "loop", {name("loop"): committed[name("loop")]})
    assert message.startswith(f"toy/loop/sm_90: {expected}")
    assert message.endswith("python -m bench.compile_gate --update")


def test_a_register_more_at_the_same_occupancy_passes(table, wrong):
    committed = {name("scale"): copy.deepcopy(table[name("scale")])}
    table[name("scale")]["registers"] = 32  # 64 warps x 32 threads x 32 registers are all that there are
    assert wrong(table, "scale", committed) == []


def test_lost_matrix_instruction_fails(table, wrong):
    committed = {name("matmul"): copy.deepcopy(table[name("matmul")])}
    table[name("matmul")]["tensor_cores"] = {"HMMA": 64}
    (message,) = wrong(table, "matmul", committed)
    assert "matrix instructions: expected HGMMA, got HMMA" in message


def test_new_and_stale_cases_fail(table, wrong):
    messages = wrong(table, "scale", {name("loop"): table[name("loop")]})
    assert [m.split(":")[0] for m in messages] == [name("scale"), name("loop")]
    assert all("--update" in m for m in messages)


def test_results_are_kept_by_source(toy, measured):
    kept = set((toy / "cache").iterdir())
    assert len(kept) == len(LAUNCHES) - sum("error" in row for row in measured.values())
    for file in kept:  # shows where a result is read instead of compiled
        file.write_text(file.read_text().replace('"registers": ', '"registers": 1000'))
    kernels = toy / "toy" / "triton_kernel.py"
    kernels.write_text(KERNELS.replace("* FACTOR", "* FACTOR + 1.0"))
    again = compiled(toy, ["scale", "matmul"])
    assert again[name("matmul")]["registers"] > 1000
    assert again[name("scale")]["registers"] < 1000
    assert again[name("scale")]["instructions"] > measured[name("scale")]["instructions"]


def _abort_at_loop(launch, arch):
    if launch.kernel == "_loop":
        os._exit(6)
    return {"error": "fine"}


def test_a_compiler_that_aborts_stops_nobody_else(monkeypatch, jobs):
    monkeypatch.setattr(compile_gate, "_compile", _abort_at_loop)
    usages = {job.name: usage["error"] for job, usage in compile_gate._compile_apart(list(jobs.values()))}
    assert usages == {**dict.fromkeys((job.name for job in jobs.values()), "fine"), "toy/loop": "the compiler aborted"}


def test_update_writes_what_check_reads(table, jobs, tmp_path, monkeypatch, capsys):
    table = {name("scale"): table[name("scale")]}
    monkeypatch.setattr(compile_gate, "interpreting", lambda: False)
    monkeypatch.setattr(compile_gate, "jobs", lambda architectures, folders: [jobs["scale"]])
    monkeypatch.setattr(compile_gate, "measure", lambda todo, cache: copy.deepcopy(table))
    arguments = ["--arch", "90", "--tables", str(tmp_path)]
    assert compile_gate.main([*arguments, "--check"]) == 2
    assert "--update" in capsys.readouterr().out
    file = tmp_path / f"triton-{triton.__version__}.json"
    kept = {"toy/other/sm_80": {}}  # the other architecture's
    compile_gate.write_table(file, {**kept, "toy/gone/sm_90": {}})
    assert compile_gate.main([*arguments, "--update"]) == 0
    assert compile_gate.read_table(file) == {**table, **kept}
    assert len(file.read_text().splitlines()) == 2 + 2  # a line per launch
    assert compile_gate.main([*arguments, "--check"]) == 0
    table[name("scale")]["instructions"] *= 2
    assert compile_gate.main([*arguments, "--check"]) == 1


def test_update_of_a_folder_keeps_the_others(table, jobs, tmp_path, monkeypatch):
    job = dataclasses.replace(jobs["scale"], name="rotary/scale")
    table = {str(job): table[name("scale")]}
    monkeypatch.setattr(compile_gate, "interpreting", lambda: False)
    monkeypatch.setattr(compile_gate, "jobs", lambda architectures, folders: [job])
    monkeypatch.setattr(compile_gate, "measure", lambda todo, cache: copy.deepcopy(table))
    file = tmp_path / f"triton-{triton.__version__}.json"
    compile_gate.write_table(file, {"rotary/old/sm_90": {}, "adam/other/sm_90": {}})
    assert compile_gate.main(["rotary", "--tables", str(tmp_path), "--update"]) == 0
    assert {*compile_gate.read_table(file)} == {*table, "adam/other/sm_90"}


def test_a_spill_that_is_expected_must_not_grow(table, jobs):
    job = dataclasses.replace(jobs["spill"], expected=Expected(may_spill=lambda c: c["BLOCK"] == 16384))
    rows = {name("spill"): table[name("spill")]}
    assert compile_gate.violations([job], rows, copy.deepcopy(rows)) == []
    less = copy.deepcopy(rows)
    less[name("spill")]["spill_bytes"] -= 8
    (message,) = compile_gate.violations([job], rows, less)
    assert "spills: expected at most" in message
