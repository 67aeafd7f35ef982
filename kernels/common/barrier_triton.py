"""A barrier among programs that all run at the same time (launch_cooperative_grid=True), for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr):
    """Counts this program; who has seen the count by `wait` sees all that the program stored before."""
    tl.debug_barrier()  # the stores of all its threads come first; the release of one thread then covers them
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, count):
    """Until so many have arrived since the counter was 0. Triton's interpreter cannot run it."""
    tl.inline_asm_elementwise(
        # One thread looks. An acquire, so that no later load takes what a cache held before.
        """{
        .reg .pred again;
        .reg .b32 came;
        mov.u32 came, %tid.x;
        setp.ne.u32 again, came, 0;
        @again bra DONE;
        LOOK:
        ld.acquire.gpu.global.b32 came, [$1];
        setp.lt.s32 again, came, $2;
        @again bra LOOK;
        DONE:
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [counter_ptr, count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()  # the others of the program go on when that thread does
