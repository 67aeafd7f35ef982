// cp.async: a copy lands when it is waited for, the latest that the hardware may take; until then its bytes are in flight.
#include "checks.h"

namespace {
void land(Warp& w, const Warp::Copy& c) {
    u8 value[16] = {};
    if (c.given) memcpy(value, global_bytes(w, c.from, c.given, c.lane, false), c.given);
    for (u32 k = 0; k < c.bytes; k++) w.block->state[c.to + k] = WRITTEN;
    memcpy(shared_bytes(w, c.to, c.bytes, c.lane, true), value, c.bytes);
    w.block->copied[c.to / 16] = 1;
}

// o: [0] to, [1] from, [2] bytes given (the rest is filled with zeros); imm: bytes; mod[0], mod[1]: offsets
void cp_async(Warp& w, const Instruction& i, u32 m) {
    const u32 *to = w.at<u32>(i.o[0]), *given = w.at<u32>(i.o[2]);
    const u64* from = w.at<u64>(i.o[1]);
    u32 bytes = u32(i.imm), real = 0;
    u64 address[32];
    each(m, [&](int l) {
        address[l] = from[l] + s64(i.mod[1]);
        if (given[l]) real |= 1u << l;
    });
    if (real) count_global(w, address, real, bytes);
    Block& b = *w.block;
    each(m, [&](int l) {
        if (given[l] > bytes) fault(l, "cp.async: %u of %u bytes", given[l], bytes);
        Warp::Copy copy{u32(to[l] + i.mod[0]), address[l], bytes, given[l], l, w.committed[l]};
        if (given[l] && w.launch().options.check) {
            global_bytes(w, copy.from, given[l], l, false);
            observe_global(w, copy.from, given[l], false, false, false);
        }
        shared_bytes(w, copy.to, bytes, l, true);  // it may land at once
        for (u32 k = 0; k < bytes; k++) b.state[copy.to + k] = IN_FLIGHT;
        memset(&b.shared[copy.to], 0xff, bytes);
        w.copies.push_back(copy);
    });
}
void commit(Warp& w, const Instruction&, u32 m) {
    each(m, [&](int l) { w.committed[l]++; });
}
void wait(Warp& w, const Instruction& i, u32 m) {  // imm: groups that may still be in flight; -1: wait_all
    std::vector<Warp::Copy> left;
    for (const Warp::Copy& c : w.copies) {
        bool due = (m >> c.lane & 1) && (i.imm < 0 || s64(c.group) < s64(w.committed[c.lane]) - i.imm);
        if (due) w.counts().needed += i.imm < 0 || c.group + 1 == w.committed[c.lane] - i.imm, land(w, c);
        else left.push_back(c);
    }
    w.copies.swap(left);
}
}  // namespace

void add_async_copies(Table& R) {
    R["cp.async"] = cp_async;
    R["cp.async.commit_group"] = commit;
    R["cp.async.wait_group"] = wait;
}
