// Access to memory, and what is checked and counted at each.
#pragma once
#include "machine.h"

// Notes that the running instruction, and the earlier one of that warp, did something wrong at an address.
void report(Warp& w, Kind kind, int pc, int block, int warp, u64 address);

// The bytes of global memory at an address that lies inside a tensor and is aligned; else a fault.
u8* global_bytes(Warp& w, u64 address, u32 bytes, int lane, bool writes);
// The bytes of shared memory: in bounds, aligned, not in flight; `value`: what will be written, if it is known.
// `strong`: an atomic's access.
u8* shared_bytes(Warp& w, u32 address, u32 bytes, int lane, bool writes, const u8* value = nullptr, bool strong = false);

// Notes that a wgmma reads 16 bytes until now.
void read_until_now(Warp& w, u32 address);
// Whether what another warp did at that epoch comes before only because of the last barrier, however often it was met.
inline bool only_barrier_orders(const Block& b, u32 epoch) { return epoch >= b.same_since && epoch < b.epoch; }

void count_global(Warp& w, const u64* address, u32 mask, u32 bytes);
// Of one request; `step`: lanes that the hardware serves at a time.
void count_shared(Warp& w, const u32* address, u32 mask, u32 bytes, int step);
