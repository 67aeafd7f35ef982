"""The engine's library and the structs that it shares with Python (engine/machine.h, engine/api.cpp)."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from genai_fast.emulator import build

ERROR_BYTES, MOST_FINDINGS = 600, 200
COUNTS = ("warps", "lanes", "requests", "sectors", "bytes", "wavefronts", "ideal", "needed")  # of each instruction
RANGE = np.dtype([("begin", "u8"), ("end", "u8"), ("tensor", "i4"), ("strict", "i4"),
                  ("read", "u8"), ("written", "u8"), ("last", "u8")])  # fmt: skip
FINDING_FIELDS = ("kind", "pc_a", "pc_b", "block_a", "block_b", "warp_a", "warp_b", "count", "address")
FINDING = np.dtype([(name, "u8" if name == "address" else "i4") for name in FINDING_FIELDS])
OPTIONS = np.dtype([("check", "i4"), ("seed", "i4"), ("max_resident", "i4"), ("waits", "i4"), ("budget", "u8")])
NOTES = np.dtype([("steps", "i8"), ("block_sectors", "i8"), ("same_value", "i8")])


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled if it is not there yet.

    Raises:
        UsageError: no compiler, or it fails.
    """
    loaded = ctypes.CDLL(str(build.library()))
    loaded.emulator_code.restype = ctypes.c_void_p
    loaded.emulator_free.argtypes = [ctypes.c_void_p]
    return loaded


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """To the array's memory."""
    return array.ctypes.data_as(ctypes.c_void_p)
