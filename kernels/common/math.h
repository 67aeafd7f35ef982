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

// e^x: |error| <= 1.2 units in the last place; infinity from where expf overflows, 0 below the normal floats.
inline float exp_fast(float x) {
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
  p = multiply_add(p, r * r, r) + 1.0f;
  // Half the power of two and twice the rest, since 2^128 is no float but e^88.7 is.
  const float half = as_float(int32_t(uint32_t(as_int(shifted)) << 23) + (126 << 23));
  const float value = 2.0f * p * half;
  // Both ends said explicitly: fused into an addition at the caller's, a product would not overflow.
  return x > 88.7228394f ? __builtin_inff() : x < -87.0f ? 0.0f : value;  // NaN fails both and stays
}

// ln(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
inline float log1p_near(float f) {
  float p = 7.0376836292e-2f;
  p = multiply_add(p, f, -1.1514610310e-1f);
  p = multiply_add(p, f, 1.1676998740e-1f);
  p = multiply_add(p, f, -1.2420140846e-1f);
  p = multiply_add(p, f, 1.4249322787e-1f);
  p = multiply_add(p, f, -1.6668057665e-1f);
  p = multiply_add(p, f, 2.0000714765e-1f);
  p = multiply_add(p, f, -2.4999993993e-1f);
  p = multiply_add(p, f, 3.3333331174e-1f);
  const float square = f * f;
  return multiply_add(p * f, square, multiply_add(-0.5f, square, f));
}

// ln x for normal positive x.
inline float log_positive(float x) {
  const int32_t bits = as_int(x), exponent = (bits - 0x3f3504f3) >> 23;  // x = 2^exponent m, m in [sqrt(1/2), sqrt(2))
  const float m = as_float(bits - (exponent << 23));
  return multiply_add(static_cast<float>(exponent), 0.693147180559945f, log1p_near(m - 1.0f));
}

// e^-a for a >= 0, to two units in the last place where the result is above 1e-7 (absolutely 1e-7 below); NaN stays.
inline float exp_minus(float a) {
  const float t = (a > 87.0f ? 87.0f : a) * -1.44269504088896341f;
  const float shifted = t + 12582912.0f;  // as in exp_fast
  const float f = t - (shifted - 12582912.0f);
  float p = 1.32764666e-3f;
  p = multiply_add(p, f, 9.67554189e-3f);
  p = multiply_add(p, f, 5.55071346e-2f);
  p = multiply_add(p, f, 2.40221202e-1f);
  p = multiply_add(p, f, 6.93146944e-1f);
  p = multiply_add(p, f, 1.00000012f);
  return as_float(as_int(p) + int32_t(uint32_t(as_int(shifted)) << 23));
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

// sin and cos of 2 pi turn24 / 2^24, turn24 in [0, 2^24): reduced to the nearest quarter turn exactly, in integers.
inline void sincos_turn(int32_t turn24, float& sine, float& cosine) {
  const int32_t quarter = (turn24 + (1 << 21)) >> 22;
  const float t = static_cast<float>(turn24 - (quarter << 22)) * 3.74507028e-7f;  // 2 pi / 2^24
  const float z = t * t;
  float s = multiply_add(z, -1.9515295891e-4f, 8.3321608736e-3f);
  s = multiply_add(z, s, -1.6666654611e-1f);
  s = multiply_add(t * z, s, t);
  float c = multiply_add(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = multiply_add(z, c, 4.166664568298827e-2f);
  c = multiply_add(z * z, c, multiply_add(-0.5f, z, 1.0f));
  const bool swap = quarter & 1;
  sine = as_float(as_int(swap ? c : s) ^ ((quarter & 2) << 30));
  cosine = as_float(as_int(swap ? s : c) ^ (((quarter + 1) & 2) << 30));
}

}  // namespace
