// The activations of activations.py, on float32.
#pragma once
#include "math.h"

namespace {

enum Activation : int { kNone = 0, kRelu = 1, kLeakyRelu = 2, kTanh = 3, kSigmoid = 4, kSilu = 5 };

inline float sigmoid(float z) {
  const float e = exp_minus(__builtin_fabsf(z)), s = 1.0f / (1.0f + e);
  return z < 0.0f ? e * s : s;
}

// Relatively to 4 units in the last place, also near 0.
inline float tanh_fast(float z) {
  const float a = __builtin_fabsf(z), q = z * z;
  float p = -5.70498872745e-3f;  // odd polynomial below 0.625 (Cephes)
  p = multiply_add(p, q, 2.06390887954e-2f);
  p = multiply_add(p, q, -5.37397155531e-2f);
  p = multiply_add(p, q, 1.33314422036e-1f);
  p = multiply_add(p, q, -3.33332819422e-1f);
  const float near = multiply_add(p * q, z, z);
  const float far = 1.0f - 2.0f / (exp_fast(2.0f * a) + 1.0f);
  return a < 0.625f ? near : z < 0.0f ? -far : far;  // NaN takes `far`
}

template <int A>
inline float activate(float z, float slope) {
  if constexpr (A == kRelu) return z > 0.0f ? z : z != z ? z : 0.0f;
  if constexpr (A == kLeakyRelu) return z > 0.0f ? z : slope * z;
  if constexpr (A == kTanh) return tanh_fast(z);
  if constexpr (A == kSigmoid) return sigmoid(z);
  if constexpr (A == kSilu) return z * sigmoid(z);
  return z;
}

// d activate / dz from z.
template <int A>
inline float derivative(float z, float slope) {
  if constexpr (A == kRelu) return z > 0.0f ? 1.0f : 0.0f;
  if constexpr (A == kLeakyRelu) return z > 0.0f ? 1.0f : slope;
  if constexpr (A == kTanh) {
    const float y = tanh_fast(z);
    return 1.0f - y * y;
  }
  if constexpr (A == kSigmoid) {
    const float y = sigmoid(z);
    return y * (1.0f - y);
  }
  if constexpr (A == kSilu) {
    const float y = sigmoid(z);
    return y * multiply_add(z, 1.0f - y, 1.0f);
  }
  return 1.0f;
}

// The same from y = activate(z); not for silu.
template <int A>
inline float derivative_from_output(float y, float slope) {
  if constexpr (A == kTanh) return 1.0f - y * y;
  if constexpr (A == kSigmoid) return y * (1.0f - y);
  return derivative<A>(y, slope);
}

// From whichever backward has.
template <int A, bool FromOutput>
inline float derivative_from(float saved, float slope) {
  if constexpr (FromOutput) return derivative_from_output<A>(saved, slope);
  return derivative<A>(saved, slope);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<A>) for the activation of that code.
template <class F>
inline void with_activation(int activation, F f) {
  switch (activation) {
    case kRelu: return f(Constant<kRelu>{});
    case kLeakyRelu: return f(Constant<kLeakyRelu>{});
    case kTanh: return f(Constant<kTanh>{});
    case kSigmoid: return f(Constant<kSigmoid>{});
    case kSilu: return f(Constant<kSilu>{});
    default: return f(Constant<kNone>{});
  }
}

// Calls f(Constant<true>) or f(Constant<false>).
template <class F>
inline void with_flag(bool flag, F f) {
  if (flag) {
    f(Constant<true>{});
  } else {
    f(Constant<false>{});
  }
}

}  // namespace
