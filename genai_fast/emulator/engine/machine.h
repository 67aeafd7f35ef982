// The state of a launch: the decoded code, the thread blocks (Triton's programs) that run, their warps and memory.
//
// A register is an array of 32 values, one a lane, in the register file of its warp; a predicate is 32 x {0, ~0}.
// Constants, parameters and special registers are registers filled before the first instruction, so that every operand
// of every instruction is an offset into the register file.
#pragma once
#include <bit>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "values.h"

struct Fault { std::string what; int lane, pc = -1; };

[[noreturn]] void fault(int lane, const char* format, auto... values) {
    char text[300];
    snprintf(text, sizeof text, format, values...);
    throw Fault{text, lane};
}

// What the engine tells Python: these structs, and the numbers of the enums, are repeated in kernel.py and findings.py.
struct Counts {  // of one instruction
    u64 warps, lanes, requests, sectors, bytes, wavefronts, ideal;
    u64 needed;  // of what orders others (barrier, wait, fence between proxies, release): what without it is unordered
};
enum class Kind {
    SHARED_READ_AFTER_WRITE, SHARED_WRITE_AFTER_READ, SHARED_WRITE_AFTER_WRITE, UNFENCED, SHARED_LANES, GLOBAL_LANES,
    GLOBAL_READ_AFTER_WRITE, GLOBAL_WRITE_AFTER_READ, GLOBAL_WRITE_AFTER_WRITE, SHARED_UNWRITTEN, OUTSIDE_VIEW,
    UNFENCED_COPY
};
struct Finding {  // of two accesses: the earlier one is `a`; a race is one finding however often it happens
    int kind, pc_a, pc_b, block_a, block_b, warp_a, warp_b, count;
    u64 address;
};
struct Range {  // of a tensor that the kernel was given; its 32-byte sectors: two bitsets, and the block that read it last
    u64 begin, end;
    int tensor, strict;  // strict: the view itself; else the rest of its storage
    u64 *read, *written;
    u32* last;
};
struct Options { int check, seed, max_resident, waits; u64 budget; };
struct Notes { s64 steps, block_sectors, same_value; };

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 active);
enum Flow { NORMAL, BRANCH, EXIT, BARRIER, YIELD };
constexpr int OPERANDS = 26, MODIFIERS = 6;

struct Instruction {
    Handler run;
    int flow, guard, negated, target;  // guard: offset of a predicate, or -1
    int mod[MODIFIERS], o[OPERANDS];   // what they mean is said where each instruction is implemented
    s64 imm;
};

struct Code {  // a decoded kernel
    std::vector<Instruction> instructions;
    std::vector<int> extra;  // operands of instructions that have too many
    int file_bytes, constant_bytes;
};

struct Launch {
    const Code& code;
    std::vector<Range> ranges;
    Options options;
    std::vector<Counts> counts;
    std::vector<Finding> findings;
    Notes notes{};
    SharedClocks clocks;      // what atomics have released
    GlobalShadow shadow;      // who accessed which word of global memory last
    bool one_block = false;   // there is nobody to release to
    u64 changes = 0;          // of global memory, by a kernel that waits
    int last_range = 0;
    Warp* current = nullptr;
    std::mt19937 random;
};

enum Written : u8 { NEVER, WRITTEN, IN_FLIGHT };  // a byte of shared memory
struct SharedWord {  // who accessed 4 bytes last
    u32 write_epoch = 0, read_epoch = 0, readers = 0;
    u32 older_epoch = 0, older = 0;  // the last epoch before read_epoch with a read, and readers until then
    u32 same = 0;                    // warps that wrote the value that is there: they read it, whoever writes it again
    int write_pc = -1, read_pc = -1;
    u8 writer = 0, written = 0, read = 0, strong = 0;  // written, read: bytes of the word
};

struct Block {
    Launch* launch;
    std::vector<Warp> warps;
    std::unique_ptr<u8[]> files;
    std::vector<u8> shared;
    std::vector<Written> state;
    std::vector<SharedWord> words;
    u32 epoch = 1, tick = 1;         // barriers so far; writes to shared memory and proxy fences so far
    u32 same_since = 1;              // the first epoch after which the instruction `barrier` has ended each
    int barrier = -1;
    bool acquired = false;           // since the last barrier
    std::vector<u16> async_readers;  // of 16-byte chunks: how many wgmma in flight read it,
    std::vector<u32> written_at;     // the tick of its last write,
    std::vector<u8> written_by;      // that one's warp,
    std::vector<u8> copied;          // and whether it was a cp.async;
    std::vector<int> late;           // 1 + the wait without which a wgmma would still read it
    bool done = false;
    u32 number = 0;  // 1, 2, ...
};

struct Group { u32 mask; int pc; bool blocked; int barrier, threads; };  // lanes of a warp at one instruction

struct Warp {
    struct Copy { u32 to; u64 from; u32 bytes, given; int lane; u32 group; };  // a cp.async in flight
    struct Product { u32 group; const int* d; int n; std::vector<f32> sum; };  // a wgmma's result before it is waited for
    u8* file;
    Block* block;
    int id;
    int pc = 0;
    bool yielded = false;
    std::vector<Group> groups;
    Clock clock;
    std::vector<Copy> copies;
    u32 committed[32] = {};  // groups of cp.async, by lane
    std::vector<Product> products;
    std::vector<u8> in_flight;  // IN_FLIGHT: registers of these, by offset / 64; WRITTEN: of `late`
    struct Late { int pc = -1; u32 group; std::vector<int> registers; std::vector<u32> chunks; };
    Late late;  // what the last wait for wgmma brought, and one that waits for a group less would not have brought
    std::vector<std::pair<u32, std::vector<u32>>> reading;  // groups of wgmma and the 16-byte chunks that they read
    u32 wgmma_group = 0, fenced_at = 0;
    std::vector<std::pair<int, u32>> fences;  // between the proxies: each instruction, and the tick of its last run

    template <class T> T* at(int offset) { return reinterpret_cast<T*>(file + offset); }
    Launch& launch() { return *block->launch; }
    Counts& counts() { return block->launch->counts[pc]; }
};

inline void each(u32 mask, auto f) {
    if (mask == ALL) {
        for (int l = 0; l < 32; l++) f(l);
    } else {
        for (u32 m = mask; m; m &= m - 1) f(std::countr_zero(m));
    }
}

inline u32 mask_of(const u32* predicate) {
    u32 m = 0;
    for (int l = 0; l < 32; l++) m |= (predicate[l] & 1u) << l;
    return m;
}

// Where instructions are looked up by name.
using Table = std::unordered_map<std::string, Handler>;
void add_integers(Table&);
void add_floats(Table&);
void add_halves(Table&);
void add_conversions(Table&);
void add_bits(Table&);
void add_memory(Table&);
void add_async_copies(Table&);
void add_atomics(Table&);
void add_exchanges(Table&);
void add_matrices(Table&);
void add_wgmma(Table&);
