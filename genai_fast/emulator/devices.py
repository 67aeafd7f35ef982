"""The GPUs that are emulated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What programs share (CUDA Programming Guide, compute capabilities), and peaks from the data sheets."""

    name: str
    multiprocessors: int
    shared_bytes: int  # of a multiprocessor
    program_shared_bytes: int  # that one program may have
    threads: int  # of a multiprocessor
    programs: int
    clock: float  # Hz
    dram: float  # bytes a second
    l2: float
    flops: float  # of bf16 with dense matrices, a second

    def resident_programs(self, threads: int, shared_bytes: int) -> int:
        """Programs that fit on the GPU at a time, by threads and shared memory; registers are ptxas's affair."""
        by_shared = self.shared_bytes // (shared_bytes + 1024)
        return self.multiprocessors * min(by_shared, self.threads // threads, self.programs)


DEVICES = {
    80: Device("A100", 108, 164 * 1024, 166912, 2048, 32, clock=1.41e9, dram=1.555e12, l2=4.0e12, flops=312e12),
    90: Device("H100", 132, 228 * 1024, 232448, 2048, 32, clock=1.755e9, dram=3.35e12, l2=5.5e12, flops=989e12),
}
