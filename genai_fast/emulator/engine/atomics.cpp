// atom and red, on global and on shared memory; lanes come one after another.
#include <algorithm>

#include "checks.h"
#include "elementwise.h"

namespace {
// o: [0] old value or -1, [1] address, [2] operand, [3] second operand of cas; mod: [0] 1 on shared memory, [4] bytes of
// an address register, [5] Order; imm: offset
template <class T, auto F> void atomic(Warp& w, const Instruction& i, u32 m) {
    Launch& k = w.launch();
    u64 address[32];
    u32 small[32];
    if (i.mod[4] == 8) each(m, [&](int l) { address[l] = w.at<u64>(i.o[1])[l] + i.imm; });
    else each(m, [&](int l) { address[l] = u32(w.at<u32>(i.o[1])[l] + i.imm); });
    if (i.mod[0]) {
        each(m, [&](int l) { small[l] = u32(address[l]); });
        count_shared(w, small, m, sizeof(T), 32);
    } else {
        count_global(w, address, m, sizeof(T));
    }
    each(m, [&](int l) {
        u8* p;
        if (i.mod[0]) {
            shared_bytes(w, small[l], sizeof(T), l, false, nullptr, true);
            p = shared_bytes(w, small[l], sizeof(T), l, true, nullptr, true);
        } else {
            p = global_bytes(w, address[l], sizeof(T), l, true);
            global_bytes(w, address[l], sizeof(T), l, false);
            if (k.options.check) {
                observe_global(w, address[l], sizeof(T), true, i.mod[5] & STRONG, false);
                order_atomic(w, address[l], i.mod[5], true, true);
            }
        }
        T old;
        memcpy(&old, p, sizeof old);
        T fresh = F(old, w.at<T>(i.o[2])[l], w.at<T>(i.o[3] < 0 ? i.o[2] : i.o[3])[l]);
        k.changes += !!memcmp(&old, &fresh, sizeof old);
        memcpy(p, &fresh, sizeof fresh);
        if (i.o[0] >= 0) w.at<T>(i.o[0])[l] = old;
    });
}
template <class T, auto F> void both(Table& R, const std::string& name) {
    R["atom." + name] = R["red." + name] = atomic<T, F>;
}
template <class T> void integers(Table& R, const std::string& t) {
    using U = std::make_unsigned_t<T>;
    both<T, [](T a, T b, T) { return T(U(a) + U(b)); }>(R, "add." + t);
    both<T, [](T a, T b, T) { return max_int<T>(a, b); }>(R, "max." + t);
    both<T, [](T a, T b, T) { return min_int<T>(a, b); }>(R, "min." + t);
}
template <class T> void bits(Table& R, const std::string& t) {
    both<T, [](T a, T b, T) { return T(a & b); }>(R, "and." + t);
    both<T, [](T a, T b, T) { return T(a | b); }>(R, "or." + t);
    both<T, [](T a, T b, T) { return T(a ^ b); }>(R, "xor." + t);
    both<T, [](T, T b, T) { return b; }>(R, "exch." + t);
    both<T, [](T a, T b, T c) { return a == b ? c : a; }>(R, "cas." + t);
}
template <class T> void halves(Table& R, const std::string& t) {
    using P = Pair<T>;
    both<T, [](T a, T b, T) { return narrow<T>(wide(a) + wide(b)); }>(R, "add." + t);
    both<P, [](P a, P b, P) {
        return P{narrow<T>(wide(a.low) + wide(b.low)), narrow<T>(wide(a.high) + wide(b.high))};
    }>(R, "add." + t + "x2");
}
}  // namespace

void add_atomics(Table& R) {
    integers<u32>(R, "u32"); integers<s32>(R, "s32"); integers<u64>(R, "u64"); integers<s64>(R, "s64");
    bits<u16>(R, "b16"); bits<u32>(R, "b32"); bits<u64>(R, "b64");
    halves<f16>(R, "f16"); halves<bf16>(R, "bf16");
    both<f32, [](f32 a, f32 b, f32) { return a + b; }>(R, "add.f32");
    both<f64, [](f64 a, f64 b, f64) { return a + b; }>(R, "add.f64");
}
