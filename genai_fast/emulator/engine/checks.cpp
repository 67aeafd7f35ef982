#include "checks.h"

#include <algorithm>

void report(Warp& w, Kind kind, int pc, int block, int warp, u64 address) {
    auto& found = w.launch().findings;
    for (Finding& f : found)
        if (f.kind == int(kind) && f.pc_a == pc && f.pc_b == w.pc) {
            f.count++;
            return;
        }
    if (found.size() < 200)
        found.push_back({int(kind), pc, w.pc, block, int(w.block->number), warp, w.id, 1, address});
}

namespace {
[[noreturn]] void outside(Launch& k, u64 address, u32 bytes, int lane, bool writes) {
    u64 distance = ~u64(0);
    const Range* near = nullptr;
    for (const Range& r : k.ranges) {
        u64 far = address < r.begin ? r.begin - address : address >= r.end ? address - r.end : 0;
        if (far < distance) distance = far, near = &r;
    }
    const char* what = writes ? "write" : "read";
    if (!near) fault(lane, "%s of %u bytes at 0x%llx, and no tensor was given", what, bytes, (unsigned long long)address);
    if (address < near->begin)
        fault(lane, "out of bounds: %s of %u bytes, %llu bytes before the begin of {tensor %d}", what, bytes,
              (unsigned long long)(near->begin - address), near->tensor);
    fault(lane, "out of bounds: %s of %u bytes at offset %llu of {tensor %d}, which ends at %llu", what, bytes,
          (unsigned long long)(address - near->begin), near->tensor, (unsigned long long)(near->end - near->begin));
}

// Counts the last barrier as needed if only it orders the access and an earlier one, whatever bytes of the word these are.
void count_needed(Warp& w, const SharedWord& s, bool writes, bool unchanged) {
    Block& b = *w.block;
    u32 others = ~(1u << w.id) & ~(unchanged ? s.same : 0);
    bool agree = writes ? unchanged : s.same >> w.id & 1;
    bool found = only_barrier_orders(b, s.write_epoch) && s.writer != w.id && !agree;
    if (writes)
        found |= (only_barrier_orders(b, s.read_epoch) && (s.readers & others)) ||
                 (only_barrier_orders(b, s.older_epoch) && (s.older & others));
    if (found) w.launch().counts[b.barrier].needed++;
}

// The last accesses of each word of shared memory, between two barriers.
void observe_shared(Warp& w, u32 address, u32 bytes, bool writes, const u8* value, bool strong) {
    Block& b = *w.block;
    bool same = value && !memcmp(&b.shared[address], value, bytes);
    int block = int(b.number);
    for (u32 a = address & ~3u; a < address + bytes; a += 4) {
        SharedWord& s = b.words[a / 4];
        u8 part = 15;
        if (a < address) part &= u8(15 << (address - a));
        if (a + 4 > address + bytes) part &= u8(15 >> (a + 4 - address - bytes));
        bool both_strong = strong && s.strong;
        count_needed(w, s, writes, same);
        if (s.write_epoch == b.epoch && s.writer != w.id && (s.written & part) && !both_strong) {
            if (!writes && !(s.same >> w.id & 1)) report(w, Kind::SHARED_READ_AFTER_WRITE, s.write_pc, block, s.writer, a);
            else if (!writes || same) w.launch().notes.same_value++;
            else report(w, Kind::SHARED_WRITE_AFTER_WRITE, s.write_pc, block, s.writer, a);
        }
        if (writes) {
            u32 others = s.read_epoch == b.epoch && (s.read & part) ? s.readers & ~(1u << w.id) : 0;
            if (same) others &= ~s.same;
            if (others && !both_strong)
                report(w, Kind::SHARED_WRITE_AFTER_READ, s.read_pc, block, std::countr_zero(others), a);
            if (s.write_epoch != b.epoch || s.writer != w.id) s.written = 0;
            s.write_epoch = b.epoch;
            s.writer = u8(w.id);
            s.same = (same ? s.same : 0) | 1u << w.id;
            s.written |= part;
            s.write_pc = w.pc;
            s.strong = strong;
        } else {
            if (s.read_epoch != b.epoch) {
                s.older = s.readers | (s.older_epoch >= b.same_since ? s.older : 0);
                s.older_epoch = s.read_epoch;
                s.readers = 0, s.read = 0;
            }
            s.read_epoch = b.epoch;
            s.readers |= 1u << w.id;
            s.read |= part;
            s.read_pc = w.pc;
        }
    }
}
}  // namespace

u8* global_bytes(Warp& w, u64 address, u32 bytes, int lane, bool writes) {
    Launch& k = w.launch();
    auto fits = [&](const Range& r) { return address >= r.begin && address + bytes <= r.end; };
    int n = int(k.ranges.size()), found = -1;
    if (n && fits(k.ranges[k.last_range])) found = k.last_range;
    for (int j = 0; found < 0 && j < n; j++)
        if (fits(k.ranges[j])) found = j;
    if (found < 0) outside(k, address, bytes, lane, writes);
    if (address % bytes && (bytes & (bytes - 1)) == 0)
        fault(lane, "misaligned: %s of %u bytes at offset %llu of {tensor %d}, address 0x%llx", writes ? "write" : "read",
              bytes, (unsigned long long)(address - k.ranges[found].begin), k.ranges[found].tensor, (unsigned long long)address);
    k.last_range = found;
    Range& r = k.ranges[found];
    if (!r.strict) report(w, Kind::OUTSIDE_VIEW, w.pc, int(w.block->number), w.id, address);
    u64 *set = writes ? r.written : r.read, base = r.begin & ~u64(31);
    for (u64 s = (address - base) / 32; s <= (address + bytes - 1 - base) / 32; s++) {
        set[s / 64] |= u64(1) << (s % 64);
        if (!writes && r.last[s] != w.block->number) r.last[s] = w.block->number, k.notes.block_sectors++;
    }
    return reinterpret_cast<u8*>(address);
}

void read_until_now(Warp& w, u32 address) {
    if (w.launch().options.check) observe_shared(w, address, 16, false, nullptr, false);
}

u8* shared_bytes(Warp& w, u32 address, u32 bytes, int lane, bool writes, const u8* value, bool strong) {
    Block& b = *w.block;
    const char* what = writes ? "write" : "read";
    if (u64(address) + bytes > b.shared.size())
        fault(lane, "out of bounds: shared %s of %u bytes at %u of %zu", what, bytes, address, b.shared.size());
    if (address % bytes) fault(lane, "misaligned: shared %s of %u bytes at %u", what, bytes, address);
    Written* state = &b.state[address];
    for (u32 k = 0; k < bytes; k++) {
        if (state[k] == IN_FLIGHT) {
            if (writes) fault(lane, "shared write at %u over a cp.async that was not waited for", address + k);
            fault(lane, "shared read at %u of what a cp.async writes that was not waited for", address + k);
        }
        if (writes) state[k] = WRITTEN;
        else if (state[k] == NEVER) {
            report(w, Kind::SHARED_UNWRITTEN, w.pc, int(b.number), w.id, address + k);
            break;
        }
    }
    if (writes) {
        if (b.async_readers[address / 16]) fault(lane, "shared write at %u of what a wgmma in flight reads", address);
        if (int at = b.late[address / 16]) w.launch().counts[at - 1].needed++;
        b.written_at[address / 16] = b.tick++;
        b.written_by[address / 16] = u8(w.id);
        b.copied[address / 16] = 0;
    }
    if (w.launch().options.check) observe_shared(w, address, bytes, writes, value, strong);
    return &b.shared[address];
}

void count_global(Warp& w, const u64* address, u32 mask, u32 bytes) {
    u64 sector[32 * 2];
    int n = 0;
    each(mask, [&](int l) {
        for (u64 s = address[l] / 32; s <= (address[l] + bytes - 1) / 32; s++)
            if (!n || sector[n - 1] != s) sector[n++] = s;
    });
    if (!std::is_sorted(sector, sector + n)) std::sort(sector, sector + n);
    n = int(std::unique(sector, sector + n) - sector);
    Counts& c = w.counts();
    u64 moved = u64(std::popcount(mask)) * bytes;
    c.requests++;
    c.sectors += n;
    c.bytes += moved;
    c.ideal += (moved + 31) / 32;
}

// Each of 32 banks serves one 4-byte word at a time.
void count_shared(Warp& w, const u32* address, u32 mask, u32 bytes, int step) {
    Counts& c = w.counts();
    for (int first = 0; first < 32; first += step) {
        u32 words[64];
        int n = 0;
        for (int l = first; l < first + step; l++)
            if (mask >> l & 1)
                for (u32 k = 0; k < bytes; k += 4) words[n++] = (address[l] + k) / 4;
        if (!n) continue;
        std::sort(words, words + n);
        n = int(std::unique(words, words + n) - words);
        int bank[32] = {}, most = 0;
        for (int k = 0; k < n; k++) most = std::max(most, ++bank[words[k] % 32]);
        c.wavefronts += most;
        c.ideal += (n + 31) / 32;
    }
    c.requests++;
    c.bytes += u64(std::popcount(mask)) * bytes;
}
