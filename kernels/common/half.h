// float16 to float32 and back, to nearest, ties to even. By the processor's instructions where it has them: C++ has a
// type for it only in newer compilers, which take it apart element by element.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

// In integers and normal float32 alone: flushing of denormal numbers must not matter.
inline float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = uint32_t(half & 0x7FFFu) << 13;
  constexpr uint32_t kLeast = 113u << 23;  // 2^-14, the least normal float16
  const uint32_t shifted = rest + kLeast;
  float small, least;
  std::memcpy(&small, &shifted, 4);
  std::memcpy(&least, &kLeast, 4);
  small -= least;
  uint32_t bits;
  std::memcpy(&bits, &small, 4);
  bits = rest < (1u << 23) ? bits : rest + ((rest < (31u << 23) ? 112u : 224u) << 23);
  bits |= sign | (rest > (31u << 23) ? 1u << 22 : 0u);  // NaN becomes quiet
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
  float small;  // below the least normal float16: beside 0.5, whose last place is theirs
  std::memcpy(&small, &rest, 4);
  small += 0.5f;
  uint32_t denormal;
  std::memcpy(&denormal, &small, 4);
  denormal -= 126u << 23;
  const uint32_t normal = (rest - (112u << 23) + 0xFFFu + (rest >> 13 & 1u)) >> 13;
  const uint32_t nan = 0x7E00u | (rest >> 13 & 0x3FFu);
  const uint32_t half = rest < (113u << 23) ? denormal : rest < 0x477FF000u ? normal : 0x7C00u;
  return uint16_t(sign | (rest > 0x7F800000u ? nan : half));
}

inline void from_halves(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < count; ++i) out[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(in[i])));
#elif defined(__ARM_FP16_FORMAT_IEEE)
  const auto* const halves = reinterpret_cast<const __fp16 __attribute__((may_alias))*>(in);
  for (; i < count; ++i) out[i] = halves[i];
#else
  for (; i < count; ++i) out[i] = from_half(in[i]);
#endif
}

inline void to_halves(const float* in, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), kNearest));
  }
  for (; i < count; ++i) out[i] = uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(in[i]), kNearest)));
#elif defined(__ARM_FP16_FORMAT_IEEE)
  auto* const halves = reinterpret_cast<__fp16 __attribute__((may_alias))*>(out);
  for (; i < count; ++i) halves[i] = __fp16(in[i]);
#else
  for (; i < count; ++i) out[i] = to_half(in[i]);
#endif
}

}  // namespace
