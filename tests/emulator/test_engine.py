"""The engine on small PTX written by hand: what it computes, and that each kind of fault is named."""

import re

import pytest
import torch

from genai_fast.emulator import build
from genai_fast.emulator.findings import KernelFault, Kind
from genai_fast.emulator.kernel import Kernel, Options
from genai_fast.emulator.ptx import Unsupported
from genai_fast.errors import UsageError

POINTER, INTEGER = ".u64 .ptr .global .align 1", ".u32"
# Registers that every test has; %rd1.. are the pointers given, %r1 is the thread, %r2 the program.
HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
{parameters}
)
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<40>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<20>;
{loads}
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    shl.b32 %r3, %r1, 2;
    cvt.u64.u32 %rd10, %r3;
{body}
    ret;
}}
"""


def kernel(body, pointers=2):
    parameters = ",\n".join(f"    .param {POINTER} a{k}" for k in range(1, pointers + 1))
    loads = "\n".join(f"    ld.param.b64 %rd{k}, [a{k}];" for k in range(1, pointers + 1))
    return Kernel(HEAD.format(parameters=parameters, loads=loads, body=body))


def run(body, *tensors, threads=32, programs=1, shared=0, **options):
    names = {f"a{k}": t for k, t in enumerate(tensors, 1)}
    return kernel(body, len(tensors)).launch((programs, 1, 1), threads, shared, names, Options(**options))


def kinds(record):
    return {f.kind for f in record.findings}


COPY = """
    add.s64 %rd3, %rd1, %rd10;
    add.s64 %rd4, %rd2, %rd10;
    ld.global.b32 %r4, [%rd3+0];
    {instruction}
    st.global.b32 [%rd4+0], %r5;
"""


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mov.b32 %r5, %r4;", lambda x: x),
        ("add.s32 %r5, %r4, -7;", lambda x: x - 7),
        ("mul.hi.s32 %r5, %r4, 65536;", lambda x: x >> 16),
        ("shr.s32 %r5, %r4, 3;", lambda x: x >> 3),
        ("bfe.u32 %r5, %r4, 4, 8;", lambda x: (x >> 4) & 255),
        ("lop3.b32 %r5, %r4, 255, 15, 0x40;", lambda x: x & 240),
        ("prmt.b32 %r5, %r4, 0, 0x4440;", lambda x: x & 255),
        ("shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1;", lambda x: x.roll(16)),
        ("redux.sync.max.s32 %r5, %r4, -1;", lambda x: x.max().expand(32)),
        ("setp.lt.s32 %p1, %r4, 0;\n selp.b32 %r5, 1, 2, %p1;", lambda x: torch.where(x < 0, 1, 2)),
        (
            "mov.b32 %r5, 5;\n setp.lt.s32 %p1, %r4, 0;\n @%p1 bra $L__1;\n mov.b32 %r5, 6;\n$L__1:",
            lambda x: (x >= 0) + 5,
        ),
        ("{\n .reg .b32 %r4;\n mov.b32 %r4, 9;\n }\n mov.b32 %r5, %r4;", lambda x: x),
    ],
)
def test_integers(instruction, expected):
    x = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64, generator=torch.Generator().manual_seed(0)).int()
    y = torch.zeros_like(x)
    run(COPY.format(instruction=instruction), x, y)
    assert torch.equal(y, expected(x).int())


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("fma.rn.f32 %f2, %f1, 0f40400000, 0fBF800000;", lambda x: (x.double() * 3 - 1).float()),
        ("max.f32 %f2, %f1, 0f00000000;", lambda x: x.clamp(min=0)),
        ("ex2.approx.ftz.f32 %f2, %f1;", lambda x: torch.exp2(x.double()).float()),
        ("cvt.rn.bf16x2.f32 %r6, 0f3F800000, %f1;\n mov.b32 {%h1, %h2}, %r6;\n cvt.f32.bf16 %f2, %h1;",
         lambda x: x.bfloat16().float()),
        ("cvt.rn.f16.f32 %h1, %f1;\n cvt.f32.f16 %f2, %h1;", lambda x: x.half().float()),
        ("cvt.rzi.s32.f32 %r6, %f1;\n cvt.rn.f32.s32 %f2, %r6;", lambda x: x.trunc()),
    ],
)  # fmt: skip
def test_floats(instruction, expected):
    x = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 5
    y = torch.zeros_like(x)
    run(COPY.format(instruction=f"mov.b32 %f1, %r4;\n{instruction}\n mov.b32 %r5, %f2;"), x, y)
    assert torch.equal(y, expected(x))


def test_an_instruction_that_is_not_implemented_is_named():
    with pytest.raises(Unsupported, match=r"kernel: `tcgen05.alloc.* of PTX line \d+"):
        kernel("tcgen05.alloc.sync [%rd1], 32;")
    with pytest.raises(Unsupported, match=r"add\.s8"):
        kernel("add.s8 %h1, %h2, %h3;")


@pytest.mark.parametrize(
    ("elements", "address", "message"),
    [
        (
            31,
            "%rd3+0",
            r"lane 31: out of bounds: read of 4 bytes at offset 124 of a1 \(float32 \[31\]\), which ends at 124",
        ),
        (32, "%rd3+-4", "read of 4 bytes, 4 bytes before the begin of a1"),
        (33, "%rd3+2", "misaligned: read of 4 bytes at offset 2 of a1"),
    ],
)
def test_an_access_outside_a_tensor_is_a_fault(elements, address, message):
    body = COPY.format(instruction="mov.b32 %r5, %r4;").replace("%rd3+0", address)
    x = torch.zeros(elements)
    with pytest.raises(KernelFault, match=message) as error:
        run(body, x, torch.zeros(32))
    assert re.search(r"in `ld.global.b32 %r4, .*` of PTX line \d+$", str(error.value))


def test_beside_a_view_is_a_warning():
    storage = torch.zeros(64)
    record = run(COPY.format(instruction="mov.b32 %r5, %r4;"), storage[:31], torch.zeros(32))
    assert kinds(record) == {Kind.OUTSIDE_VIEW}
    assert all(f.is_warning for f in record.findings)


NEIGHBOUR = """
    mov.b32 %r6, memory;
    add.s32 %r7, %r6, %r3;
    st.shared.b32 [%r7+0], %r1;
    {barrier}
    xor.b32 %r8, %r3, 128;
    add.s32 %r8, %r8, %r6;
    ld.shared.b32 %r9, [%r8+0];
    add.s64 %rd4, %rd1, %rd10;
    st.global.b32 [%rd4+0], %r9;
"""


def test_warps_meet_at_a_barrier():
    y = torch.zeros(64, dtype=torch.int32)
    record = run(NEIGHBOUR.format(barrier="bar.sync 0;"), y, threads=64, shared=256)
    assert not record.findings
    assert torch.equal(y, torch.arange(64).roll(32).int())


@pytest.mark.parametrize(("barriers", "needed"), [(1, [True]), (2, [False, False])])
def test_one_of_two_barriers_is_not_needed(barriers, needed):
    y = torch.zeros(64, dtype=torch.int32)
    record = run(NEIGHBOUR.format(barrier="bar.sync 0;\n" * barriers), y, threads=64, shared=256)
    assert [bool(n) for s, n in zip(record.statements, record.counts[:, -1], strict=True) if "bar" in s.name] == needed


def test_a_missing_barrier_is_a_race_in_shared_memory():
    for seed in range(4):
        y = torch.zeros(64, dtype=torch.int32)
        record = run(NEIGHBOUR.format(barrier=""), y, threads=64, shared=256, seed=seed)
        races = {Kind.SHARED_READ_AFTER_WRITE, Kind.SHARED_WRITE_AFTER_READ}
        assert kinds(record) & races
        assert "without a barrier" in " ".join(f.text for f in record.findings)
        assert not all(f.is_warning for f in record.findings)


def test_a_read_of_unwritten_shared_memory_is_reported():
    body = "mov.b32 %r6, memory;\n ld.shared.b32 %r9, [%r6+64];\n st.global.b32 [%rd1+0], %r9;"
    record = run(body, torch.zeros(1), shared=128)
    assert Kind.SHARED_UNWRITTEN in kinds(record)
    with pytest.raises(KernelFault, match="out of bounds: shared read of 4 bytes at 64 of 64"):
        run(body, torch.zeros(1), shared=64)


ASYNC = """
    mov.b32 %r6, memory;
    add.s32 %r7, %r6, %r3;
    add.s64 %rd3, %rd1, %rd10;
    cp.async.ca.shared.global [%r7+0], [%rd3+0], 4, 4;
    cp.async.commit_group;
    cp.async.wait_group {left};
    ld.shared.b32 %r9, [%r7+0];
    cp.async.wait_all;
    add.s64 %rd4, %rd2, %rd10;
    st.global.b32 [%rd4+0], %r9;
"""


def test_a_copy_is_there_when_it_was_waited_for():
    x, y = torch.randn(32), torch.zeros(32)
    run(ASYNC.format(left=0), x, y, shared=128)
    assert torch.equal(x, y)
    with pytest.raises(KernelFault, match=r"shared read at 0 of what a cp.async writes that was not waited for"):
        run(ASYNC.format(left=1), x, y, shared=128)


def test_lanes_of_a_store_that_disagree_are_told():
    record = run("st.global.b32 [%rd1+0], %r1;", torch.zeros(1))
    assert kinds(record) == {Kind.GLOBAL_LANES}
    assert not run("st.global.b32 [%rd1+0], %r2;", torch.zeros(1)).findings


MESSAGE = """
    setp.ne.s32 %p1, %r2, 0;
    setp.ne.s32 %p2, %r1, 0;
    @%p1 bra $L__reader;
    st.global.b32 [%rd1+0], 42;
    @%p2 bra $L__end;
    {send}
    bra $L__end;
$L__reader:
    {receive}
    setp.eq.s32 %p3, %r5, 0;
    @%p3 bra $L__reader;
    ld.global.b32 %r6, [%rd1+0];
    st.global.b32 [%rd3+0], %r6;
$L__end:
"""
RELEASE, RELAXED = (
    "atom.global.gpu.release.add.u32 %r4, [%rd2+0], 1;",
    "atom.global.gpu.relaxed.add.u32 %r4, [%rd2+0], 1;",
)
ACQUIRE, LOOK = "ld.acquire.gpu.global.b32 %r5, [%rd2+0];", "ld.relaxed.gpu.global.b32 %r5, [%rd2+0];"
FENCE = "fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    ("send", "receive", "ordered"),
    [
        (RELEASE, ACQUIRE, True),
        (RELAXED, ACQUIRE, False),
        (RELEASE, LOOK, False),
        (FENCE + RELAXED, LOOK + FENCE, True),
        (FENCE + RELAXED, LOOK, False),
        (RELEASE.replace(".gpu", ".cta"), ACQUIRE, False),
        ("st.release.gpu.global.b32 [%rd2+0], 1;", ACQUIRE, True),
        ("st.global.b32 [%rd2+0], 1;", ACQUIRE, False),
    ],
)
def test_programs_are_ordered_by_release_and_acquire(send, receive, ordered):
    for seed in range(3):
        x, flag, y = (torch.zeros(1, dtype=torch.int32) for _ in range(3))
        record = run(MESSAGE.format(send=send, receive=receive), x, flag, y, programs=2, seed=seed)
        assert int(y) == 42
        races = {Kind.GLOBAL_READ_AFTER_WRITE, Kind.GLOBAL_WRITE_AFTER_READ}
        assert bool(kinds(record) & races) is not ordered


def test_two_programs_that_write_one_element_race():
    record = run("st.global.b32 [%rd1+0], %r2;", torch.zeros(1), programs=2)
    assert kinds(record) == {Kind.GLOBAL_WRITE_AFTER_WRITE}
    assert "two programs" in record.findings[0].text and "a1 (float32 [1]) at byte 0" in record.findings[0].text


def test_programs_that_wait_for_one_that_does_not_fit_are_a_deadlock():
    # Both add 1 and wait for 2.
    body = """
    setp.ne.s32 %p2, %r1, 0;
    @%p2 bra $L__end;
    atom.global.gpu.acq_rel.add.u32 %r4, [%rd1+0], 1;
$L__look:
    ld.acquire.gpu.global.b32 %r5, [%rd1+0];
    setp.lt.s32 %p3, %r5, 2;
    @%p3 bra $L__look;
$L__end:
    """
    run(body, torch.zeros(1, dtype=torch.int32), programs=2)
    with pytest.raises(KernelFault, match=r"deadlock: 1 programs wait .* 1 fit on the GPU at a time"):
        run(body, torch.zeros(1, dtype=torch.int32), programs=2, max_resident=1)


def test_a_barrier_that_some_threads_do_not_reach_is_a_deadlock():
    with pytest.raises(KernelFault, match="deadlock: 64 of 64 threads wait at a barrier"):
        run("setp.lt.s32 %p1, %r1, 32;\n @%p1 bra $L__1;\n bar.sync 0;\n$L__1:\n bar.sync 1, 96;", threads=64)
    with pytest.raises(KernelFault, match="a barrier that only some lanes of a warp reach"):
        run("setp.lt.s32 %p1, %r1, 7;\n @%p1 bar.sync 0;")


def test_an_endless_loop_ends():
    with pytest.raises(KernelFault, match="more than 1000 warp instructions"):
        run("$L__1:\n bra $L__1;", budget=1000)


def test_without_a_compiler_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"emulated GPU: expected a C\+\+ compiler, found none; remedy: install"):
        build.library()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    with pytest.raises(UsageError, match=r"failed:\n(.|\n)*no-such-flag"):
        build.library()
    assert not list(tmp_path.iterdir())


def test_counters():
    record = run(COPY.format(instruction="mov.b32 %r5, %r4;"), torch.zeros(64), torch.zeros(64))
    assert record.by_class()["global load"] == 1
    assert record.load_sectors == record.store_sectors == 4
    assert record.sector_ratio == 1.0
    assert record.footprint == (128, 128)
    strided = COPY.format(instruction="mov.b32 %r5, %r4;").replace(
        "add.s64 %rd3, %rd1, %rd10", "mad.lo.s64 %rd3, %rd10, 8, %rd1"
    )
    assert run(strided, torch.zeros(256), torch.zeros(64)).load_sectors == 32
    conflicts = "mov.b32 %r6, memory;\n shl.b32 %r7, %r1, 7;\n add.s32 %r7, %r7, %r6;\n st.shared.b32 [%r7+0], %r1;"
    assert run(conflicts, shared=4096).conflict_ratio == 32.0
