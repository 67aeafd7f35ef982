// Moves, logic, shifts, and what takes registers apart and puts them together.
#include "elementwise.h"

namespace {
template <class T> T shift_left(T a, u32 n) { return n >= 8 * sizeof(T) ? 0 : T(a << n); }
template <class T> T shift_right(T a, u32 n) { return n >= 8 * sizeof(T) ? 0 : T(a >> n); }

template <class T> T insert(T a, T b, u32 from, u32 length) {
    from &= 255;
    length &= 255;
    T out = b;
    for (u32 k = 0; k < length && from + k < 8 * sizeof(T); k++)
        out = T(out & ~(T(1) << (from + k))) | T(((a >> k) & 1) << (from + k));
    return out;
}
template <class T> void bfi(Warp& w, const Instruction& i, u32 m) {
    T *d = w.at<T>(i.o[0]), *a = w.at<T>(i.o[1]), *b = w.at<T>(i.o[2]);
    u32 *c = w.at<u32>(i.o[3]), *e = w.at<u32>(i.o[4]);
    each(m, [=](int l) { d[l] = insert<T>(a[l], b[l], c[l], e[l]); });
}
template <class T> void selp(Warp& w, const Instruction& i, u32 m) {
    T* d = w.at<T>(i.o[0]);
    const T *a = w.at<T>(i.o[1]), *b = w.at<T>(i.o[2]);
    const u32* p = w.at<u32>(i.o[3]);
    each(m, [=](int l) { d[l] = p[l] ? a[l] : b[l]; });
}

// mov into and out of vectors. mod[0] parts, mod[1] bytes of one; o[0] the whole, o[1..] the parts (-1: not wanted).
void pack(Warp& w, const Instruction& i, u32 m) {
    int n = i.mod[0], size = i.mod[1];
    for (int k = 0; k < n; k++)
        each(m, [&](int l) { memcpy(w.file + i.o[0] + (l * n + k) * size, w.file + i.o[1 + k] + l * size, size); });
}
void unpack(Warp& w, const Instruction& i, u32 m) {
    int n = i.mod[0], size = i.mod[1];
    u8 whole[32 * 16];
    memcpy(whole, w.file + i.o[0], 32 * n * size);  // a part may be the register that is taken apart
    for (int k = 0; k < n; k++)
        if (i.o[1 + k] >= 0)
            each(m, [&](int l) { memcpy(w.file + i.o[1 + k] + l * size, whole + (l * n + k) * size, size); });
}

void prmt(Warp& w, const Instruction& i, u32 m) {
    u32 *d = w.at<u32>(i.o[0]), *a = w.at<u32>(i.o[1]), *b = w.at<u32>(i.o[2]), *c = w.at<u32>(i.o[3]);
    each(m, [=](int l) {
        u64 both = u64(b[l]) << 32 | a[l];
        u32 out = 0;
        for (int k = 0; k < 4; k++) {
            u32 pick = c[l] >> (4 * k), byte = (both >> (8 * (pick & 7))) & 255;
            if (pick & 8) byte = byte & 128 ? 255 : 0;
            out |= byte << (8 * k);
        }
        d[l] = out;
    });
}
template <bool LEFT, bool CLAMP> void shf(Warp& w, const Instruction& i, u32 m) {
    u32 *d = w.at<u32>(i.o[0]), *a = w.at<u32>(i.o[1]), *b = w.at<u32>(i.o[2]), *c = w.at<u32>(i.o[3]);
    each(m, [=](int l) {
        u64 both = u64(b[l]) << 32 | a[l];
        u32 n = CLAMP ? min_int(c[l], 32u) : c[l] & 31;
        d[l] = LEFT ? u32((both << n) >> 32) : u32(both >> n);
    });
}
void lop3(Warp& w, const Instruction& i, u32 m) {  // imm: the truth table
    u32 *d = w.at<u32>(i.o[0]), *a = w.at<u32>(i.o[1]), *b = w.at<u32>(i.o[2]), *c = w.at<u32>(i.o[3]);
    u32 table = u32(i.imm);
    each(m, [=](int l) {
        u32 out = 0;
        for (int k = 0; k < 8; k++)
            if (table >> k & 1) out |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
        d[l] = out;
    });
}
constexpr auto reversed = [](u32 a) {
    u32 r = 0;
    for (int k = 0; k < 32; k++) r |= (a >> k & 1) << (31 - k);
    return r;
};
void nothing(Warp&, const Instruction&, u32) {}

template <class T> void bits(Table& R, const std::string& t) {
    R["mov." + t] = unary<T, T, [](T a) { return a; }>;
    R["and." + t] = binary<T, T, T, [](T a, T b) { return T(a & b); }>;
    R["or." + t] = binary<T, T, T, [](T a, T b) { return T(a | b); }>;
    R["xor." + t] = binary<T, T, T, [](T a, T b) { return T(a ^ b); }>;
    R["not." + t] = unary<T, T, [](T a) { return T(~a); }>;
    R["shl." + t] = binary<T, T, u32, [](T a, u32 n) { return shift_left<T>(a, n); }>;
    R["shr." + t] = binary<T, T, u32, [](T a, u32 n) { return shift_right<T>(a, n); }>;
    R["selp." + t] = selp<T>;
    R["setp.eq." + t] = setp<T, [](T a, T b) { return a == b; }>;
    R["setp.ne." + t] = setp<T, [](T a, T b) { return a != b; }>;
    if constexpr (sizeof(T) >= 4) R["bfi." + t] = bfi<T>;
}
}  // namespace

void add_bits(Table& R) {
    bits<u16>(R, "b16"); bits<u32>(R, "b32"); bits<u64>(R, "b64"); bits<u32>(R, "pred");
    R["popc.b32"] = unary<u32, u32, [](u32 a) { return u32(std::popcount(a)); }>;
    R["popc.b64"] = unary<u32, u64, [](u64 a) { return u32(std::popcount(a)); }>;
    R["clz.b32"] = unary<u32, u32, [](u32 a) { return u32(std::countl_zero(a)); }>;
    R["clz.b64"] = unary<u32, u64, [](u64 a) { return u32(std::countl_zero(a)); }>;
    R["brev.b32"] = unary<u32, u32, reversed>;
    R["pack"] = pack; R["unpack"] = unpack; R["prmt.b32"] = prmt; R["lop3.b32"] = lop3; R["nothing"] = nothing;
    R["shf.l.wrap.b32"] = shf<true, false>; R["shf.l.clamp.b32"] = shf<true, true>;
    R["shf.r.wrap.b32"] = shf<false, false>; R["shf.r.clamp.b32"] = shf<false, true>;
}
