// Runs the blocks of a launch: each warp for a random number of instructions, blocks in a random order.
#pragma once
#include "machine.h"

// Fills the special registers, which come first in a register file, and what else a block starts with.
void start_block(Block& b, Launch& k, const int* grid, int at, int threads, int shared_bytes, const u8* constants);
// Until the block ends (true), or until a warp of it waits for another block (false).
bool run_block(Block& b);
// All blocks of the grid; throws a Fault.
void run_grid(Launch& k, const int* grid, int threads, int shared_bytes, const u8* constants);
