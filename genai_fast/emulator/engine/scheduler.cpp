#include "scheduler.h"

#include <algorithm>
#include <climits>
#include <numeric>

namespace {
constexpr int BARRIERS = 16;
constexpr u32 QUANTUM = 400;        // instructions of a warp at most, before another one's turn
constexpr int IDLE_ROUNDS = 1000;   // without any change of memory, after which blocks that wait are in deadlock

// Lanes of a warp that stand at the same instruction go on together.
void merge(Warp& w) {
    auto& g = w.groups;
    for (size_t a = 0; a < g.size(); a++)
        for (size_t b = a + 1; b < g.size();) {
            if (g[a].pc == g[b].pc && g[a].blocked == g[b].blocked) {
                g[a].mask |= g[b].mask;
                g.erase(g.begin() + b);
            } else {
                b++;
            }
        }
}

void leave(Warp& w, u32 lanes) {
    for (const Warp::Copy& c : w.copies)
        if (lanes >> c.lane & 1) fault(c.lane, "the thread ends with a cp.async in flight");
}

void check_registers(Warp& w, const Instruction& i) {
    for (int o : i.o) {
        if (o < 0 || !w.in_flight[o / 64]) continue;
        if (w.in_flight[o / 64] == IN_FLIGHT) fault(-1, "uses the result of a wgmma that was not waited for");
        w.launch().counts[w.late.pc].needed++;
    }
}

enum Outcome { CONTINUES, SPLIT, WAITS };

// One instruction of a group of lanes. SPLIT: the groups of the warp have changed.
Outcome step(Warp& w, size_t which) {
    Launch& k = w.launch();
    Group& g = w.groups[which];
    const Instruction& i = k.code.instructions[g.pc];
    w.pc = g.pc;
    u32 m = g.mask;
    if (i.guard >= 0) m &= mask_of(w.at<u32>(i.guard)) ^ (i.negated ? ALL : 0);
    Counts& c = k.counts[g.pc];
    c.warps++;
    c.lanes += std::popcount(m);
    if (u64(++k.notes.steps) > k.options.budget)
        fault(-1, "more than %llu warp instructions in one launch", (unsigned long long)k.options.budget);
    if (!w.products.empty() || w.late.pc >= 0) check_registers(w, i);
    switch (i.flow) {
        case NORMAL:
            if (m) i.run(w, i, m);
            g.pc++;
            return CONTINUES;
        case YIELD:
            if (m) i.run(w, i, m);
            g.pc++;
            return m && k.options.waits ? WAITS : CONTINUES;
        case BRANCH:
            if (!m) {
                g.pc++;
            } else if (m == g.mask) {
                g.pc = i.target;
            } else {
                g.mask &= ~m;
                g.pc++;
                w.groups.push_back({m, i.target, false, 0, 0});
                return SPLIT;
            }
            return CONTINUES;
        case EXIT:
            leave(w, m);
            g.mask &= ~m;
            g.pc++;
            if (g.mask) return CONTINUES;
            w.groups.erase(w.groups.begin() + which);
            return SPLIT;
        default:
            if (m != g.mask) fault(-1, "a barrier that only some lanes of a warp reach");
            g.pc++;
            g.blocked = true;
            g.barrier = i.mod[0];
            g.threads = i.mod[1];
            return SPLIT;
    }
}

// Lanes at the lowest instruction go first, so that those of a warp meet again. Whether any of them moved.
bool run_warp(Warp& w) {
    Launch& k = w.launch();
    bool moved = false;
    w.yielded = false;
    k.current = &w;
    u32 left = k.options.seed ? 1 + k.random() % QUANTUM : UINT_MAX;
    for (;;) {
        if (w.groups.size() > 1) merge(w);
        int best = -1, limit = INT_MAX;
        for (size_t q = 0; q < w.groups.size(); q++)
            if (!w.groups[q].blocked && (best < 0 || w.groups[q].pc < w.groups[best].pc)) best = int(q);
        if (best < 0) return moved;
        for (size_t q = 0; q < w.groups.size(); q++)
            if (int(q) != best && !w.groups[q].blocked) limit = std::min(limit, w.groups[q].pc);
        moved = true;
        Outcome outcome = CONTINUES;
        while (outcome == CONTINUES && w.groups[best].pc < limit) {
            if (!left--) return true;
            outcome = step(w, best);
        }
        if (outcome == WAITS) {
            w.yielded = true;
            return true;
        }
    }
}

// After a barrier. Of which it is not known what it orders alone is counted as needed: one of some warps, one at which
// warps come by several instructions, the first one after an acquire.
void begin_epoch(Block& b, int barrier, bool plain) {
    if (!plain || b.acquired) b.launch->counts[barrier].needed++;
    if (!plain || b.barrier != barrier) b.same_since = b.epoch;
    b.barrier = barrier;
    b.acquired = false;
}

// Lets go of the barriers at which all threads have come; whether there was one.
bool release_barriers(Block& b) {
    u32 threads[BARRIERS] = {}, needed[BARRIERS] = {}, warps[BARRIERS] = {}, live = 0;
    int at[BARRIERS] = {};  // the instruction after the barrier
    bool several[BARRIERS] = {};
    for (Warp& w : b.warps)
        for (Group& g : w.groups) {
            live += std::popcount(g.mask);
            if (!g.blocked) continue;
            threads[g.barrier] += std::popcount(g.mask);
            needed[g.barrier] = g.threads;
            warps[g.barrier] |= 1u << w.id;
            if (at[g.barrier] && at[g.barrier] != g.pc) several[g.barrier] = true, b.launch->counts[g.pc - 1].needed++;
            at[g.barrier] = g.pc;
        }
    bool released = false;
    for (int n = 0; n < BARRIERS; n++) {
        if (!threads[n] || threads[n] < (needed[n] ? needed[n] : live)) continue;
        for (Warp& w : b.warps)
            for (Group& g : w.groups)
                if (g.blocked && g.barrier == n) g.blocked = false;
        released = true;
        if (b.launch->options.check) synchronize_clocks(b, warps[n]);
        bool all = !needed[n] || needed[n] >= live;
        begin_epoch(b, at[n] - 1, all && !several[n]);
        b.epoch += all;
    }
    return released;
}
}  // namespace

bool run_block(Block& b) {
    std::vector<int> turn(b.warps.size());
    std::iota(turn.begin(), turn.end(), 0);
    for (;;) {
        if (b.launch->options.seed) std::shuffle(turn.begin(), turn.end(), b.launch->random);
        bool moved = false, left = false, yielded = false, preempted = false;
        for (int q : turn) {
            Warp& w = b.warps[q];
            moved |= run_warp(w);
            left |= !w.groups.empty();
            yielded |= w.yielded;
            for (const Group& g : w.groups) preempted |= !g.blocked && !w.yielded;
        }
        if (!left) return true;
        if (preempted) continue;
        bool released = release_barriers(b);
        if (!released && yielded) return false;
        if (!released && !moved) {
            u32 waiting = 0, live = 0;
            for (Warp& w : b.warps)
                for (Group& g : w.groups) live += std::popcount(g.mask), waiting += g.blocked ? std::popcount(g.mask) : 0;
            fault(-1, "deadlock: %u of %u threads wait at a barrier", waiting, live);
        }
    }
}

void start_block(Block& b, Launch& k, const int* grid, int at, int threads, int shared_bytes, const u8* constants) {
    size_t count = (threads + 31) / 32, chunks = shared_bytes / 16 + 1;
    if (!b.files) {
        b.files.reset(new u8[k.code.file_bytes * count]);
        memset(b.files.get(), 0xcd, k.code.file_bytes * count);
    }
    b.launch = &k;
    b.done = false;
    b.number = at + 1;
    b.epoch = b.tick = b.same_since = 1;
    b.barrier = -1;
    b.acquired = false;
    b.async_readers.assign(chunks, 0);
    b.written_at.assign(chunks, 0);
    b.written_by.assign(chunks, 0);
    b.copied.assign(chunks, 0);
    b.late.assign(chunks, 0);
    b.shared.assign(shared_bytes, 0xff);
    b.state.assign(shared_bytes + 4, NEVER);
    if (k.options.check) b.words.assign(shared_bytes / 4 + 1, SharedWord{});
    b.warps.clear();
    b.warps.resize(count);
    for (int q = 0; q < int(count); q++) {
        Warp& w = b.warps[q];
        w.block = &b;
        w.id = q;
        w.file = b.files.get() + size_t(k.code.file_bytes) * q;
        memcpy(w.file, constants, k.code.constant_bytes);
        // tid, ntid, ctaid and nctaid (x, y, z of each), laneid, warpid
        u32 x = at % grid[0], y = at / grid[0] % grid[1], z = at / grid[0] / grid[1];
        u32 values[14] = {0, 0, 0, u32(threads), 1, 1, x, y, z, u32(grid[0]), u32(grid[1]), u32(grid[2]), 0, u32(q)};
        for (int r = 0; r < 14; r++)
            for (int l = 0; l < 32; l++) w.at<u32>(r * 128)[l] = r == 0 ? 32 * q + l : r == 12 ? l : values[r];
        int left = threads - 32 * q;
        w.groups.push_back({left >= 32 ? ALL : (1u << left) - 1, 0, false, 0, 0});
    }
    start_clocks(b);
}

namespace {
// The blocks of the grid through the slots of the GPU.
void run_slots(Launch& k, std::vector<std::unique_ptr<Block>>& slots, int n, auto start) {
    int next = 0, idle = 0, open = int(slots.size());
    for (auto& slot : slots) {
        slot = std::make_unique<Block>();
        start(*slot, next++);
    }
    while (open) {
        u64 before = k.changes;
        bool ended = false;
        for (auto& slot : slots) {
            if (slot->done || !run_block(*slot)) continue;
            ended = true;
            if (next < n) {
                start(*slot, next++);
            } else {
                slot->done = true;
                open--;
            }
        }
        idle = ended || k.changes != before ? 0 : idle + 1;
        if (idle > IDLE_ROUNDS)
            fault(-1, "deadlock: %d programs wait for what no program does; of %d, %d have started, and %d fit on the GPU at a time",
                  open, n, next, k.options.max_resident);
    }
}
}  // namespace

void run_grid(Launch& k, const int* grid, int threads, int shared_bytes, const u8* constants) {
    int n = grid[0] * grid[1] * grid[2];
    k.one_block = n == 1;
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    if (k.options.seed) std::shuffle(order.begin(), order.end(), k.random);
    // Blocks that do not wait for each other can run one after another: races between them are found by clocks.
    std::vector<std::unique_ptr<Block>> slots(std::min(n, k.options.waits ? k.options.max_resident : 1));
    try {
        run_slots(k, slots, n, [&](Block& b, int which) {
            start_block(b, k, grid, order[which], threads, shared_bytes, constants);
        });
    } catch (Fault& f) {
        const Warp& w = *k.current;
        u32 at = w.block->number - 1;
        char where[100];
        snprintf(where, sizeof where, "program (%u, %u, %u), warp %d, lane %d: ", at % grid[0], at / grid[0] % grid[1],
                 at / grid[0] / grid[1], w.id, f.lane);
        f.what = where + f.what;
        f.pc = w.pc;
        throw;
    }
}
