"""Tile sizes of the GPU kernels.

Where a `capability` (80, 90, 100, 120: ten times the compute capability) has a tile of its own, the usual one spills
registers there.
"""

from genai_fast.kernels.common.launch import next_power_of_2


def padded(channels: int) -> int:
    """Channels as tl.dot takes them."""
    return max(next_power_of_2(channels), 16)


def _tile(rows: int, columns: int, warps: int, stages: int) -> dict[str, int]:
    return dict(BLOCK_M=rows, BLOCK_N=columns, num_warps=warps, num_stages=stages)


def forward_tile(size: int, channels: int, queries: int, extra: int, capability: int) -> dict[str, int]:
    """BLOCK_M queries a program, BLOCK_N keys a step. `size` of an element in bytes; `extra`: see the launcher."""
    width = padded(channels)
    if size == 4:  # mostly without matrix instructions
        return _tile(32, 32 if width <= 64 else 16, 8, 1) if width <= 128 else _tile(16, 16, 8, 1)
    if width > 128:
        return _tile(64, 32, 8, 2)
    rows = 128 if queries > 64 else 64
    columns = 32 if extra else 64
    warps = 8 if 100 <= capability < 120 else rows // 16
    if width > 64 and capability < 90:
        return _tile(rows, columns, warps, 1 if extra else 3)
    return _tile(rows, columns, warps, 3 if width <= 64 else 2)


def queries_tile(size: int, channels: int, extra: int, capability: int) -> dict[str, int]:
    """dQ: BLOCK_M queries a program, BLOCK_N keys a step."""
    width = padded(channels)
    if size == 4:  # mostly without matrix instructions
        return _tile(32, 32 if width <= 64 else 16, 8, 1) if width <= 128 else _tile(16, 16, 8, 1)
    if width > 128:
        return _tile(32, 32, 8, 1)
    if width > 64 or extra:
        return _tile(64 if extra else 128, 32, 8, 1 if extra and capability >= 120 else 2)
    return _tile(128, 64 if channels % 8 == 0 else 32, 8, 2)  # other rows are read number by number


def keys_tile(size: int, channels: int, extra: int, capability: int) -> dict[str, int]:
    """dK, dV: BLOCK_N keys a program, BLOCK_M queries a step."""
    width = padded(channels)
    if size == 4:  # mostly without matrix instructions
        return _tile(32, 32, 8, 1) if width <= 64 else _tile(16, 16, 8, 1)
    if width > 128:
        return _tile(32, 32, 8, 1)
    if width > 64 and extra and capability >= 120:
        return _tile(32, 32, 8, 2)
    if extra:
        alone = extra > 1 and not 100 <= capability < 120
        if alone or capability >= (100 if width > 64 else 120):
            return _tile(32, 64, 8, 1)
        return _tile(32, 64, 8, 3 if width > 64 and capability >= 90 else 2)
    if width > 64 or channels % 8:
        return _tile(32, 64, 8, 3)
    return _tile(32, 128, 8, 1 if capability < 90 else 2 if 100 <= capability < 120 else 3)


def summary_rows(channels: int) -> int:
    """Rows a program that multiplies gradient and output: 4096 elements."""
    return 4096 // padded(channels)
