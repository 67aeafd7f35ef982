"""How a layer is spread over a GPU."""

from genai_fast.kernels.common.launch import ceil_div, next_power_of_2

ROWS = 16  # samples of a program: the fewer, the shorter a step, but tl.dot multiplies no fewer
MOST_BYTES = 1024  # of a state, in a layer that runs in one launch: 512 units of 2 bytes


def width(hidden: int) -> int:
    """Units as tl.dot takes them."""
    return max(next_power_of_2(hidden), 16)


def sequence_tile(hidden: int, size: int, backward: bool, units: int = 0) -> dict[str, int]:
    """BLOCK_B samples and UNITS hidden units a program; `size` of an element in bytes, `units` 0 for the rule."""
    wide = width(hidden)
    units = min(wide, units or 64 // size)
    warps = 8 if size == 2 and not backward else 4  # with the other number registers spill, or warps do the same twice
    return dict(BLOCK_B=ROWS, UNITS=units, WIDTH=wide, num_warps=warps, num_stages=1)


def shared_bytes(tile: dict[str, int], size: int, backward: bool) -> int:
    """Shared memory that a program takes at most: its units' weights, the states or gradients that it reads, 4 KiB."""
    rows = 4 * tile["UNITS"] + tile["BLOCK_B"] * (4 if backward else 1)
    return rows * tile["WIDTH"] * size + 4096


def plan(
    batch: int, hidden: int, size: int, backward: bool, exact: bool, multiprocessors: int, most_shared: int,
    units: int = 0,
) -> tuple[tuple[int, int], dict[str, int]] | None:  # fmt: skip
    """Grid and constants of a launch whose programs all run at the same time, one on a multiprocessor; or None.

    `exact`: float32 without matrix instructions, whose backward spills registers; `most_shared`: bytes of shared memory
    that a program may have.
    """
    odd = hidden % 16 and hidden > 64  # long rows that are read number by number spill, too
    if not batch or hidden * size > MOST_BYTES or odd or (exact and backward):
        return None
    tile = sequence_tile(hidden, size, backward, units)
    grid = ceil_div(hidden, tile["UNITS"]), ceil_div(batch, ROWS)
    fits = grid[0] * grid[1] <= multiprocessors and shared_bytes(tile, size, backward) <= most_shared
    return (grid, tile) if fits else None
