// The activations of activations.py, on float32.
#pragma once
#include "math.h"

namespace {

enum Activation : int {
  kNone = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kTanh = 3,
  kSigmoid = 4,
  kSilu = 5,
  kGelu = 6,
  kGeluTanh = 7,
  kElu = 8,
  kRelu6 = 9,
  kSelu = 10,
  kHardswish = 11,
  kSoftplus = 12,
  kMish = 13,
  kPrelu = 14,  // of a slope for each channel
};

// Those whose derivative takes an exponential.
constexpr bool takes_exponential(int activation) {
  return activation > kLeakyRelu && activation != kRelu6 && activation != kHardswish && activation != kPrelu;
}

// Those whose result alone may give the derivative.
constexpr bool output_gives_derivative(int activation) { return activation <= kSigmoid; }

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

// The standard normal beyond a >= 0: its density, and the probability of what lies further out as a share of it
// (Mills' ratio). Both relatively accurate as far as the density is a normal float; 0 beyond.
struct NormalTail {
  float density, ratio;
};

inline NormalTail normal_tail(float a) {
  const float t = a > 16.0f ? 16.0f : a;  // NaN stays
  const float square = t * t;
#if defined(__FMA__) || defined(__aarch64__)
  const float rest = __builtin_fmaf(t, t, -square);  // what rounding took, which the exponential would magnify
#else
  const float rest = 0.0f;
#endif
  const float e = 0.398942280f * exp_fast(-0.5f * square);
  const float u = 1.0f / multiply_add(t, 0.3515625f, 1.0f);  // 1 .. 0 for 0 .. infinity; minimax fit of ratio / u
  float p = -7.36785382e-2f;
  p = multiply_add(p, u, 3.59971434e-1f);
  p = multiply_add(p, u, -6.29488826e-1f);
  p = multiply_add(p, u, 3.78674388e-1f);
  p = multiply_add(p, u, -4.82832119e-2f);
  p = multiply_add(p, u, 2.60355175e-1f);
  p = multiply_add(p, u, 3.02159786e-1f);
  p = multiply_add(p, u, 3.52058738e-1f);
  p = multiply_add(p, u, 3.51545185e-1f);
  return {multiply_add(e, -0.5f * rest, e), p * u};
}

// tanh's GELU is z sigmoid(w), w = sqrt(8 / pi) (z + 0.044715 z^3): sigmoid(w), and its derivative by z.
struct TanhGate {
  float gate, slope;
};

inline TanhGate tanh_gate(float z) {
  const float square = z * z > 1e4f ? 1e4f : z * z;  // the gate is 0 or 1 long before
  const float w = z * multiply_add(square, 7.13548162726e-2f, 1.59576912161f);
  const float e = exp_minus(__builtin_fabsf(w)), s = 1.0f / (1.0f + e);
  return {w < 0.0f ? e * s : s, e * s * s * multiply_add(square, 0.214064448818f, 1.59576912161f)};
}

// Mish is z gate, gate = tanh(ln(1 + e^z)), of which `slope` is the derivative by z. With t = e^-|z| nothing overflows.
inline TanhGate mish_gate(float z) {
  const float t = exp_minus(__builtin_fabsf(z)), square = t * t;
  const float above = z < 0.0f ? multiply_add(2.0f, t, square) : multiply_add(2.0f, t, 1.0f);
  const float rest = z < 0.0f ? 1.0f : square, share = 1.0f / multiply_add(2.0f, rest, above);
  return {above * share, 4.0f * (1.0f + t) * (z < 0.0f ? t : square) * share * share};
}

constexpr float kSeluScale = 1.05070098736f, kSeluBelow = 1.75809934085f;
constexpr float kSoftplusThreshold = 20.0f;

template <int A>
inline float activate(float z, float slope) {
  if constexpr (A == kRelu) return z > 0.0f ? z : z != z ? z : 0.0f;
  if constexpr (A == kLeakyRelu || A == kPrelu) return z > 0.0f ? z : slope * z;
  if constexpr (A == kTanh) return tanh_fast(z);
  if constexpr (A == kSigmoid) return sigmoid(z);
  if constexpr (A == kSilu) return z * sigmoid(z);
  if constexpr (A == kGelu) {
    const NormalTail tail = normal_tail(__builtin_fabsf(z));
    const float beyond = tail.density * tail.ratio;
    return z * (z > 0.0f ? 1.0f - beyond : beyond);
  }
  if constexpr (A == kGeluTanh) return z * tanh_gate(z).gate;
  if constexpr (A == kElu) return z > 0.0f ? z : slope * expm1_negative(z);
  if constexpr (A == kRelu6) return z > 0.0f ? z < 6.0f ? z : 6.0f : z != z ? z : 0.0f;
  if constexpr (A == kSelu) return z > 0.0f ? kSeluScale * z : kSeluBelow * expm1_negative(z);
  if constexpr (A == kHardswish) {
    const float gate = z + 3.0f;
    return z * (0.166666667f * (gate > 0.0f ? gate < 6.0f ? gate : 6.0f : 0.0f));  // z itself keeps NaN
  }
  if constexpr (A == kSoftplus) {
    const float b = slope * z, above = b > 0.0f ? b : 0.0f;
    const float value = (above + log1p_unit(exp_minus(__builtin_fabsf(b)))) / slope;
    return b > kSoftplusThreshold ? z : value;
  }
  if constexpr (A == kMish) return z * mish_gate(z).gate;
  return z;
}

// d activate / dz from z.
template <int A>
inline float derivative(float z, float slope) {
  if constexpr (A == kRelu) return z > 0.0f ? 1.0f : 0.0f;
  if constexpr (A == kLeakyRelu || A == kPrelu) return z > 0.0f ? 1.0f : slope;
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
  if constexpr (A == kGelu) {  // Phi(z) + z density(z)
    const float a = __builtin_fabsf(z);
    const NormalTail tail = normal_tail(a);
    const float beyond = tail.density * (tail.ratio - a);
    return z > 0.0f ? 1.0f - beyond : beyond;
  }
  if constexpr (A == kGeluTanh) {
    const TanhGate g = tanh_gate(z);
    return multiply_add(z, g.slope, g.gate);
  }
  if constexpr (A == kElu) return z > 0.0f ? 1.0f : slope * exp_fast(z);
  if constexpr (A == kRelu6) return z > 0.0f ? z < 6.0f ? 1.0f : 0.0f : 0.0f;
  if constexpr (A == kSelu) return z > 0.0f ? kSeluScale : kSeluBelow * exp_fast(z);
  if constexpr (A == kHardswish) return z >= 3.0f ? 1.0f : z <= -3.0f ? 0.0f : multiply_add(z, 0.333333333f, 0.5f);
  if constexpr (A == kSoftplus) return slope * z > kSoftplusThreshold ? 1.0f : sigmoid(slope * z);
  if constexpr (A == kMish) {
    const TanhGate g = mish_gate(z);
    return multiply_add(z, g.slope, g.gate);
  }
  return 1.0f;
}

// The same from y = activate(z), where `output_gives_derivative`.
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

// Calls f(Constant<A>) for the activation of that code, which is among these codes.
template <int... Codes, class F>
inline void with_one_of(int activation, F f) {
  (void)((activation == Codes && (f(Constant<Codes>{}), true)) || ...);
}

// The same among all but kPrelu.
template <class F>
inline void with_activation(int activation, F f) {
  with_one_of<kNone, kRelu, kLeakyRelu, kTanh, kSigmoid, kSilu, kGelu, kGeluTanh, kElu, kRelu6, kSelu, kHardswish,
              kSoftplus, kMish>(activation, f);
}

// Calls f(Constant<A>, Constant<whether from the output>) for a backward pass; only for pairs that there are.
template <class F>
inline void with_derivative(int activation, bool from_output, F f) {
  with_activation(activation, [&](auto a) {
    if constexpr (output_gives_derivative(decltype(a)::value)) {
      if (from_output) return f(a, Constant<true>{});
    }
    f(a, Constant<false>{});
  });
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
