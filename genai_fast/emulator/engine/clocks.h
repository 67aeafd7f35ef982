// Happens-before in global memory: vector clocks of warps, joined by barriers and by atomics that release and acquire.
//
// A warp's time is a number that grows at each barrier and each release. A warp knows, of every warp of its own block
// and of others, up to which time what it did has happened before. An access is ordered after an earlier one by another
// warp if that one's time is known; if it is not, and one of both writes, the two race, in whatever order they ran.
#pragma once
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "values.h"

using Times = std::vector<u32>;                // of the warps of a block
using Others = std::unordered_map<u32, Times>;  // by number of the block

struct Clock {  // what a warp knows
    Times own;
    std::shared_ptr<const Others> others;  // of other blocks; null: nothing
    std::shared_ptr<const Others> fenced;  // what a relaxed atomic after a fence releases
    std::shared_ptr<const Others> seen;    // what a fence after a relaxed atomic acquires
};

using SharedClocks = std::unordered_map<u64, std::shared_ptr<const Others>>;  // what was released at an address

// How an access to global memory orders others: bits of an instruction's modifier.
enum Order { STRONG = 1, ACQUIRE = 2, RELEASE = 4 };

struct Access {
    u32 block = 0, time = 0, epoch = 0;  // block 0: none
    int pc = 0;
    u8 warp = 0, bytes = 0, strong = 0;  // which bytes of the word
    u32 warps = 0;                       // of the block, that this instruction read the word in
};
struct GlobalWord { Access write, read[2]; };  // of the readers two: more would only make a race more likely to be seen

struct GlobalShadow {
    static constexpr u64 WORDS = 1024;  // of a page
    std::unordered_map<u64, std::unique_ptr<GlobalWord[]>> pages;
    u64 last = ~u64(0);
    GlobalWord* page = nullptr;

    GlobalWord& word(u64 address) {
        u64 number = address / 4 / WORDS;
        if (number != last) {
            auto& found = pages[number];
            if (!found) found.reset(new GlobalWord[WORDS]);
            last = number;
            page = found.get();
        }
        return page[address / 4 % WORDS];
    }
};

struct Warp;
struct Block;
void start_clocks(Block&);
void synchronize_clocks(Block&, u32 warps);  // those that a barrier has let go
void order_atomic(Warp&, u64 address, int order, bool reads, bool writes);
void order_fence(Warp&);
// Whether the access races with an earlier one; `same`: it writes what is there already.
void observe_global(Warp&, u64 address, u32 bytes, bool writes, bool strong, bool same);
