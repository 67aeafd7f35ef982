// float32 functions without branches, so that loops over them vectorise. Infinities and NaN flow through.
#pragma once
#include <cstdint>

namespace {

inline float as_float(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline int32_t as_int(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// a b + c: contracted to one instruction where the machine has it. (fmaf would call a slow function elsewhere.)
inline float multiply_add(float a, float b, float c) { return a * b + c; }

// x = n ln 2 + r: e^r - 1, and the integer n in the low bits of `shifted`.
struct Reduced {
  float less_one;
  int32_t shifted;
};

inline Reduced reduced_exp(float x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits too.
  const float shifted = multiply_add(x, 1.44269504088896341f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  float r = multiply_add(n, -0.693359375f, x);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  return {multiply_add(p, r * r, r), as_int(shifted)};
}

// 2^(n + more) of a reduced x.
inline float power_of_2(const Reduced& x, uint32_t more) {
  return as_float(int32_t((uint32_t(x.shifted) << 23) + ((127u + more) << 23)));
}

// e^x: |error| <= 1.2 units in the last place; infinity from where expf overflows, 0 below the normal floats.
inline float exp_fast(float x) {
  const Reduced reduced = reduced_exp(x);
  // Half the power of two and twice the rest, since 2^128 is no float but e^88.7 is.
  const float value = 2.0f * (reduced.less_one + 1.0f) * power_of_2(reduced, ~0u);
  // Both ends said explicitly: fused into an addition at the caller's, a product would not overflow.
  return x > 88.7228394f ? __builtin_inff() : x < -87.0f ? 0.0f : value;  // NaN fails both and stays
}

// e^x - 1 for x <= 0, relatively to 2 units in the last place, also near 0.
inline float expm1_negative(float x) {
  const Reduced reduced = reduced_exp(x);
  const float power = power_of_2(reduced, 0);
  return x < -30.0f ? -1.0f : multiply_add(power, reduced.less_one, power - 1.0f);
}

// -2 ln u for normal u in (0, 1): |relative error| <= 3e-7, near 1 too. Minimax fit of -2 ln(1 + f) / f.
inline float minus_two_log(float u) {
  const int32_t bits = as_int(u), exponent = (bits - 0x3f3504f3) >> 23;  // u = 2^exponent (1 + f), 1 + f near 1
  const float f = as_float(int32_t(uint32_t(bits) - (uint32_t(exponent) << 23))) - 1.0f;
  float p = 2.02137753e-1f;
  p = multiply_add(p, f, -3.24451625e-1f);
  p = multiply_add(p, f, 3.45016658e-1f);
  p = multiply_add(p, f, -3.98003310e-1f);
  p = multiply_add(p, f, 4.99398172e-1f);
  p = multiply_add(p, f, -6.66701198e-1f);
  p = multiply_add(p, f, 1.00000727f);
  p = multiply_add(p, f, -1.99999988f);
  return multiply_add(static_cast<float>(exponent), -1.38629436f, p * f);
}

// e^-a for a >= 0, to two units in the last place where the result is above 1e-7 (absolutely 1e-7 below); 0 below the
// normal floats; NaN stays.
inline float exp_minus(float a) {
  const float t = a * -1.44269504088896341f;
  const float shifted = t + 12582912.0f;  // as in exp_fast
  const float f = t - (shifted - 12582912.0f);
  float p = 1.32764666e-3f;
  p = multiply_add(p, f, 9.67554189e-3f);
  p = multiply_add(p, f, 5.55071346e-2f);
  p = multiply_add(p, f, 2.40221202e-1f);
  p = multiply_add(p, f, 6.93146944e-1f);
  p = multiply_add(p, f, 1.00000012f);
  const float value = as_float(int32_t(uint32_t(as_int(p)) + (uint32_t(as_int(shifted)) << 23)));
  return a > 87.0f ? 0.0f : a == a ? value : a;
}

// ln(1 + e) for e in [0, 1]: |relative error| <= 4e-7. Coefficients: minimax fit of ln(1 + e) / e.
inline float log1p_unit(float e) {
  float p = -8.53910483e-3f;
  p = multiply_add(p, e, 4.40892801e-2f);
  p = multiply_add(p, e, -1.07681252e-1f);
  p = multiply_add(p, e, 1.77452117e-1f);
  p = multiply_add(p, e, -2.44954541e-1f);
  p = multiply_add(p, e, 3.32754791e-1f);
  p = multiply_add(p, e, -4.99974042e-1f);
  p = multiply_add(p, e, 9.99999821e-1f);
  return p * e;
}

// sin and cos of 2 pi (word >> 8) / 2^24, absolutely to 2e-7. The word's upper 24 bits are reduced to the nearest half
// turn exactly, in integers; an odd number of half turns changes both signs.
inline void sincos_turn(uint32_t word, float& sine, float& cosine) {
  const float t = static_cast<float>(int32_t(word << 1) >> 9) * 3.74507039e-7f;  // 2 pi / 2^24
  const int32_t sign = int32_t((word + 0x40000000u) & 0x80000000u);
  const float z = t * t;
  float s = multiply_add(z, 2.60005459e-6f, -1.98066147e-4f);
  s = multiply_add(z, s, 8.33301712e-3f);
  s = multiply_add(z, s, -1.66666567e-1f);
  s = multiply_add(t * z, s, t);
  float c = multiply_add(z, 2.31943850e-5f, -1.38559274e-3f);
  c = multiply_add(z, c, 4.16639894e-2f);
  c = multiply_add(z, c, -4.99999315e-1f);
  c = multiply_add(z, c, 1.0f);
  sine = as_float(as_int(s) ^ sign);
  cosine = as_float(as_int(c) ^ sign);
}

}  // namespace
