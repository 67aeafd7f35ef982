// cvt. ROUND is 0 none or to nearest even, 1 to zero, 2 down, 3 up, 4 to the nearest even integer.
#include "elementwise.h"

namespace {
template <class F> F integral(F x, int round) {
    return round == 1 ? std::trunc(x) : round == 2 ? std::floor(x) : round == 3 ? std::ceil(x) : std::nearbyint(x);
}
template <class D, class S, int ROUND> D convert(S x) {
    if constexpr (floating<S> && floating<D>) {
        if constexpr (ROUND >= 2 || (ROUND == 1 && sizeof(D) >= sizeof(S))) {
            auto y = integral(wide(x), ROUND);
            if constexpr (sizeof(D) == 2) return narrow<D>(f32(y));
            else return D(y);
        } else if constexpr (ROUND == 1) {  // to a narrower type
            if constexpr (std::is_same_v<D, bf16>) return bf16{u16(std::bit_cast<u32>(f32(wide(x))) >> 16)};
            else if constexpr (std::is_same_v<D, f32>) return toward_zero(wide(x));
            else return narrow<D>(f32(wide(x)));
        } else if constexpr (std::is_same_v<D, bf16>) {
            return narrow<bf16>(f32(wide(x)));
        } else {
            return D(wide(x));
        }
    } else if constexpr (floating<S>) {
        auto y = integral(wide(x), ROUND);
        if (y != y) return sizeof(D) == 8 ? D(u64(1) << 63) : D(0);
        f64 low = f64(std::numeric_limits<D>::min()), up = f64(std::numeric_limits<D>::max());
        return f64(y) <= low ? std::numeric_limits<D>::min() : f64(y) >= up ? std::numeric_limits<D>::max() : D(y);
    } else if constexpr (floating<D>) {
        if constexpr (std::is_same_v<D, f64>) return f64(x);
        else if constexpr (ROUND == 1) return narrow<D>(toward_zero(f64(x)));
        else return narrow<D>(f32(x));
    } else {
        return D(x);
    }
}

// Registers may be wider than the type: mod[0] and mod[1] are their bytes. mod[2] saturates to [0, 1], mod[3] is ftz.
template <class D, class S, int ROUND> void cvt(Warp& w, const Instruction& i, u32 m) {
    if (i.mod[0] == int(sizeof(D)) && i.mod[1] == int(sizeof(S)) && !i.mod[2] && !i.mod[3])
        return unary<D, S, [](S x) { return convert<D, S, ROUND>(x); }>(w, i, m);
    each(m, [&](int l) {
        S x;
        memcpy(&x, w.file + i.o[1] + l * i.mod[1], sizeof x);
        if constexpr (std::is_same_v<S, f32>)
            if (i.mod[3]) x = ftz(x);
        D y = convert<D, S, ROUND>(x);
        if constexpr (floating<D>) {
            if (i.mod[2]) {
                auto z = wide(y);
                z = z != z ? 0 : z < 0 ? 0 : z > 1 ? 1 : z;
                if constexpr (std::is_same_v<D, f64>) y = z;
                else y = narrow<D>(f32(z));
            }
            if constexpr (std::is_same_v<D, f32>)
                if (i.mod[3]) y = ftz(y);
            memcpy(w.file + i.o[0] + l * i.mod[0], &y, sizeof y);
        } else {
            s64 full = s64(y);  // extended to the register, by sign or by zeros
            memcpy(w.file + i.o[0] + l * i.mod[0], &full, i.mod[0]);
        }
    });
}
template <class T> void cvt_pair(Warp& w, const Instruction& i, u32 m) {  // o: d, high, low; mod[0]: relu
    Pair<T>* d = w.at<Pair<T>>(i.o[0]);
    const f32 *high = w.at<f32>(i.o[1]), *low = w.at<f32>(i.o[2]);
    if (i.mod[0])
        each(m, [=](int l) { d[l] = {narrow<T>(low[l] < 0 ? 0 : low[l]), narrow<T>(high[l] < 0 ? 0 : high[l])}; });
    else
        each(m, [=](int l) { d[l] = {narrow<T>(low[l]), narrow<T>(high[l])}; });
}

constexpr bool special(u32 u) { return (u & 0x7f800000) == 0x7f800000; }
constexpr auto tf32_away = [](u32 u) { return special(u) ? u : (u + 0x1000) & 0xffffe000; };
constexpr auto tf32_even = [](u32 u) { return special(u) ? u : (u + 0xfff + ((u >> 13) & 1)) & 0xffffe000; };

template <class D, class S> void both(Table& R, const std::string& d, const std::string& s) {
    std::string end = "." + d + "." + s;
    R["cvt" + end] = cvt<D, S, 0>;
    if constexpr (floating<D> || floating<S>) {
        R["cvt.rn" + end] = cvt<D, S, 0>;
        R["cvt.rz" + end] = cvt<D, S, 1>;
    }
    if constexpr (floating<S>) {
        R["cvt.rzi" + end] = cvt<D, S, 1>;
        R["cvt.rmi" + end] = cvt<D, S, 2>;
        R["cvt.rpi" + end] = cvt<D, S, 3>;
        R["cvt.rni" + end] = cvt<D, S, 4>;
    }
}
template <class D> void to(Table& R, const std::string& d) {
    both<D, u8>(R, d, "u8"); both<D, s8>(R, d, "s8"); both<D, u16>(R, d, "u16"); both<D, s16>(R, d, "s16");
    both<D, u32>(R, d, "u32"); both<D, s32>(R, d, "s32"); both<D, u64>(R, d, "u64"); both<D, s64>(R, d, "s64");
    both<D, f16>(R, d, "f16"); both<D, bf16>(R, d, "bf16"); both<D, f32>(R, d, "f32"); both<D, f64>(R, d, "f64");
}
}  // namespace

void add_conversions(Table& R) {
    to<u8>(R, "u8"); to<s8>(R, "s8"); to<u16>(R, "u16"); to<s16>(R, "s16"); to<u32>(R, "u32"); to<s32>(R, "s32");
    to<u64>(R, "u64"); to<s64>(R, "s64"); to<f16>(R, "f16"); to<bf16>(R, "bf16"); to<f32>(R, "f32"); to<f64>(R, "f64");
    R["cvt.f16x2.f32"] = cvt_pair<f16>;
    R["cvt.bf16x2.f32"] = cvt_pair<bf16>;
    R["cvt.rna.tf32.f32"] = unary<u32, u32, tf32_away>;
    R["cvt.rn.tf32.f32"] = unary<u32, u32, tf32_even>;
}
