// Types of PTX values, and how they are widened, rounded and compared.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using f32 = float; using f64 = double; using f16 = _Float16;
using u128 = unsigned __int128; using s128 = __int128;
constexpr u32 ALL = ~0u;  // lanes of a warp; also what a predicate holds where it is true

struct bf16 { u16 bits; };

inline f32 wide(bf16 x) { return std::bit_cast<f32>(u32(x.bits) << 16); }
inline f32 wide(f16 x) { return f32(x); }
inline f32 wide(f32 x) { return x; }
inline f64 wide(f64 x) { return x; }

template <class T> inline T narrow(f32 x) {  // to nearest even
    if constexpr (std::is_same_v<T, bf16>) {
        u32 u = std::bit_cast<u32>(x);
        return bf16{u16(x != x ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
    } else {
        return T(x);
    }
}

template <class T>
constexpr bool floating =
    std::is_same_v<T, f16> || std::is_same_v<T, bf16> || std::is_same_v<T, f32> || std::is_same_v<T, f64>;

// Subnormals become zero.
inline f32 ftz(f32 x) {
    u32 u = std::bit_cast<u32>(x);
    return std::bit_cast<f32>(u & 0x7f800000 ? u : u & 0x80000000);
}

inline f32 toward_zero(f64 x) {
    f32 y = f32(x);
    return std::isfinite(y) && std::fabs(f64(y)) > std::fabs(x) ? std::nextafter(y, 0.f) : y;
}

// A factor of a matrix product, exactly; of TF32 only the bits that the tensor core looks at.
template <class T> inline f64 factor(T x) {
    if constexpr (std::is_same_v<T, u32>) return std::bit_cast<f32>(x & 0xffffe000);
    else return wide(x);
}

template <class T> struct Pair { T low, high; };  // two halves of 32 bits
