// Integer arithmetic and comparisons.
#include "elementwise.h"

namespace {
template <class T> T shift_right(T a, u32 n) {
    return n >= 8 * sizeof(T) ? (std::is_signed_v<T> && a < 0 ? T(-1) : T(0)) : T(a >> n);
}
template <class T> T divide(T a, T b) {  // by zero: all bits, as GPUs do
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>)
        if (b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
    return a / b;
}
template <class T> T remainder_of(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
        if (b == T(-1)) return 0;
    return a % b;
}
template <class T> constexpr T high(T a, T b) {  // half of the product
    if constexpr (sizeof(T) == 8) {
        using W = std::conditional_t<std::is_signed_v<T>, s128, u128>;
        return T((W(a) * W(b)) >> 64);
    } else {
        using W = std::conditional_t<std::is_signed_v<T>, s64, u64>;
        return T((W(a) * W(b)) >> (8 * sizeof(T)));
    }
}
template <class T> T extract(T a, u32 from, u32 length) {  // bfe
    from &= 255;
    length &= 255;
    constexpr u32 bits = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    bool sign = false;
    if (std::is_signed_v<T> && length) sign = (U(a) >> min_int(from + length - 1, bits - 1)) & 1;
    U out = 0;
    for (u32 k = 0; k < bits; k++) {
        bool bit = k < length && from + k < bits ? (U(a) >> (from + k)) & 1 : sign;
        out |= U(bit) << k;
    }
    return T(out);
}

template <class T> void integers(Table& R, const std::string& t) {
    using U = std::make_unsigned_t<T>;
    R["add." + t] = binary<T, T, T, [](T a, T b) { return T(U(a) + U(b)); }>;
    R["sub." + t] = binary<T, T, T, [](T a, T b) { return T(U(a) - U(b)); }>;
    R["mul.lo." + t] = binary<T, T, T, [](T a, T b) { return T(U(u64(U(a)) * u64(U(b)))); }>;
    R["mul.hi." + t] = binary<T, T, T, [](T a, T b) { return high<T>(a, b); }>;
    R["mad.lo." + t] = ternary<T, T, T, T, [](T a, T b, T c) { return T(U(u64(U(a)) * u64(U(b)) + u64(U(c)))); }>;
    R["mad.hi." + t] = ternary<T, T, T, T, [](T a, T b, T c) { return T(U(high<T>(a, b)) + U(c)); }>;
    R["div." + t] = binary<T, T, T, [](T a, T b) { return divide<T>(a, b); }>;
    R["rem." + t] = binary<T, T, T, [](T a, T b) { return remainder_of<T>(a, b); }>;
    R["max." + t] = binary<T, T, T, [](T a, T b) { return max_int<T>(a, b); }>;
    R["min." + t] = binary<T, T, T, [](T a, T b) { return min_int<T>(a, b); }>;
    R["neg." + t] = unary<T, T, [](T a) { return T(U(0) - U(a)); }>;
    R["abs." + t] = unary<T, T, [](T a) { return T(a < 0 ? U(0) - U(a) : U(a)); }>;
    R["shr." + t] = binary<T, T, u32, [](T a, u32 n) { return shift_right<T>(a, n); }>;
    R["setp.eq." + t] = setp<T, [](T a, T b) { return a == b; }>;
    R["setp.ne." + t] = setp<T, [](T a, T b) { return a != b; }>;
    R["setp.lt." + t] = R["setp.lo." + t] = setp<T, [](T a, T b) { return a < b; }>;
    R["setp.le." + t] = R["setp.ls." + t] = setp<T, [](T a, T b) { return a <= b; }>;
    R["setp.gt." + t] = R["setp.hi." + t] = setp<T, [](T a, T b) { return (a > b); }>;
    R["setp.ge." + t] = R["setp.hs." + t] = setp<T, [](T a, T b) { return a >= b; }>;
    if constexpr (sizeof(T) >= 4)
        R["bfe." + t] = ternary<T, T, u32, u32, [](T a, u32 b, u32 c) { return extract<T>(a, b, c); }>;
    if constexpr (sizeof(T) < 8) {
        using W = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, s32, s64>,
                                     std::conditional_t<sizeof(T) == 2, u32, u64>>;
        R["mul.wide." + t] = binary<W, T, T, [](T a, T b) { return W(W(a) * W(b)); }>;
        R["mad.wide." + t] = ternary<W, T, T, W, [](T a, T b, W c) { return W(u64(W(a) * W(b)) + u64(c)); }>;
    }
}
template <class T> void pairs(Table& R, const std::string& t) {  // two 16-bit integers in 32 bits
    using P = Pair<T>;
    R["add." + t] = binary<P, P, P, [](P a, P b) { return P{T(a.low + b.low), T(a.high + b.high)}; }>;
    R["sub." + t] = binary<P, P, P, [](P a, P b) { return P{T(a.low - b.low), T(a.high - b.high)}; }>;
    R["max." + t] = binary<P, P, P, pair2<T, [](T a, T b) { return max_int<T>(a, b); }>>;
    R["min." + t] = binary<P, P, P, pair2<T, [](T a, T b) { return min_int<T>(a, b); }>>;
}
}  // namespace

void add_integers(Table& R) {
    integers<u16>(R, "u16"); integers<s16>(R, "s16"); integers<u32>(R, "u32");
    integers<s32>(R, "s32"); integers<u64>(R, "u64"); integers<s64>(R, "s64");
    pairs<s16>(R, "s16x2"); pairs<u16>(R, "u16x2");
    R["min.relu.s32"] = binary<s32, s32, s32, [](s32 a, s32 b) { return max_int<s32>(min_int<s32>(a, b), 0); }>;
    R["max.relu.s32"] = binary<s32, s32, s32, [](s32 a, s32 b) { return max_int<s32>(max_int<s32>(a, b), 0); }>;
}
