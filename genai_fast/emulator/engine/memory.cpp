// ld, st, ldmatrix, stmatrix and the fence between the proxies.
#include <algorithm>

#include "checks.h"

namespace {
// Lanes that store different values at one address: which one stays is undefined.
void compare_lanes(Warp& w, const Instruction& i, const u64* address, u32 m, bool shared) {
    int n = i.mod[0], size = i.mod[1], reg = i.mod[2];
    u64 order[32];
    int count = 0;
    each(m, [&](int l) { order[count++] = address[l] << 5 | u32(l); });
    std::sort(order, order + count);
    for (int q = 1; q < count; q++) {
        if (order[q] >> 5 != order[q - 1] >> 5) continue;
        int a = order[q - 1] & 31, b = order[q] & 31;
        for (int k = 0; k < n; k++)
            if (memcmp(w.file + i.o[1 + k] + a * reg, w.file + i.o[1 + k] + b * reg, size))
                return report(w, shared ? Kind::SHARED_LANES : Kind::GLOBAL_LANES, w.pc, int(w.block->number), w.id, address[a]);
    }
}

// mod: [0] elements, [1] bytes of one, [2] bytes of a register, [3] signed, [4] bytes of an address register,
// [5] Order; o[0] address, o[1..] registers; imm: offset
template <bool SHARED, bool STORES> void access(Warp& w, const Instruction& i, u32 m) {
    int n = i.mod[0], size = i.mod[1], reg = i.mod[2];
    u32 bytes = n * size;
    Launch& k = w.launch();
    u64 address[32];
    u32 small[32];
    if (i.mod[4] == 8) {
        const u64* a = w.at<u64>(i.o[0]);
        for (int l = 0; l < 32; l++) address[l] = a[l] + i.imm;
    } else {
        const u32* a = w.at<u32>(i.o[0]);
        for (int l = 0; l < 32; l++) address[l] = u32(a[l] + i.imm);
    }
    if constexpr (SHARED) {
        for (int l = 0; l < 32; l++) small[l] = u32(address[l]);
        count_shared(w, small, m, bytes, bytes <= 4 ? 32 : bytes == 8 ? 16 : 8);
    } else {
        count_global(w, address, m, bytes);
    }
    if constexpr (STORES)
        if (k.options.check) compare_lanes(w, i, address, m, SHARED);
    each(m, [&](int l) {
        u8 value[32];
        if constexpr (STORES)
            for (int q = 0; q < n; q++) memcpy(value + q * size, w.file + i.o[1 + q] + l * reg, size);
        u8* p;
        if constexpr (SHARED) {
            p = shared_bytes(w, small[l], bytes, l, STORES, STORES ? value : nullptr);
        } else {
            p = global_bytes(w, address[l], bytes, l, STORES);
            bool same = false;
            if constexpr (STORES) same = !memcmp(p, value, bytes), k.changes += !same;
            if (k.options.check) {
                observe_global(w, address[l], bytes, STORES, i.mod[5] & STRONG, same);
                if (i.mod[5]) order_atomic(w, address[l], i.mod[5], !STORES, STORES);
            }
        }
        if constexpr (STORES) {
            memcpy(p, value, bytes);
        } else {
            memcpy(value, p, bytes);
            for (int q = 0; q < n; q++) {
                if (i.o[1 + q] < 0) continue;
                u8* d = w.file + i.o[1 + q] + l * reg;
                if (size == reg) {
                    memcpy(d, value + q * size, size);
                    continue;
                }
                s64 full = 0;
                memcpy(&full, value + q * size, size);
                if (i.mod[3]) full = full << (64 - 8 * size) >> (64 - 8 * size);
                memcpy(d, &full, reg);
            }
        }
    });
}

// mod: [0] matrices of 8 x 8 halves, [1] transposed; o[0] address, o[1..] registers
template <bool STORES> void move_matrices(Warp& w, const Instruction& i, u32 m) {
    const char* name = STORES ? "stmatrix" : "ldmatrix";
    if (m != ALL) fault(-1, "%s: only the lanes %08x came", name, m);
    const u32* a = w.at<u32>(i.o[0]);
    u32 address[32];
    for (int l = 0; l < 32; l++) address[l] = u32(a[l] + i.imm);
    count_shared(w, address, i.mod[0] == 4 ? ALL : (1u << 8 * i.mod[0]) - 1, 16, 8);
    for (int k = 0; k < i.mod[0]; k++) {
        u16 rows[8][8];
        u16* d = w.at<u16>(i.o[1 + k]);
        auto element = [&](int l, int h) -> u16& {
            return i.mod[1] ? rows[l % 4 * 2 + h][l / 4] : rows[l / 4][l % 4 * 2 + h];
        };
        auto row = [&](int r) {
            const u8* value = STORES ? reinterpret_cast<u8*>(rows[r]) : nullptr;
            return shared_bytes(w, address[8 * k + r], 16, 8 * k + r, STORES, value);
        };
        if constexpr (!STORES)
            for (int r = 0; r < 8; r++) memcpy(rows[r], row(r), 16);
        for (int l = 0; l < 32; l++)
            for (int h = 0; h < 2; h++) {
                if constexpr (STORES) element(l, h) = d[2 * l + h];
                else d[2 * l + h] = element(l, h);
            }
        if constexpr (STORES)
            for (int r = 0; r < 8; r++) memcpy(row(r), rows[r], 16);
    }
}

void fence(Warp& w, const Instruction&, u32) {
    if (w.launch().options.check) order_fence(w);
}
void fence_async(Warp& w, const Instruction&, u32) {
    w.fenced_at = w.block->tick++;
    std::erase_if(w.fences, [&](auto& f) { return f.first == w.pc; });
    w.fences.push_back({w.pc, w.fenced_at});
}
}  // namespace

void add_memory(Table& R) {
    R["ld.global"] = access<false, false>;
    R["st.global"] = access<false, true>;
    R["ld.shared"] = access<true, false>;
    R["st.shared"] = access<true, true>;
    R["ldmatrix"] = move_matrices<false>;
    R["stmatrix"] = move_matrices<true>;
    R["fence"] = fence;
    R["fence.proxy.async"] = fence_async;
}
