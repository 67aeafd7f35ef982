// The random stream of philox.py: Philox4x32-10 by intrinsics (the compiler's own vector code is half as fast),
// Box-Muller by plain loops.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "math.h"

namespace {

constexpr uint32_t kRoundA = 0xD2511F53u, kRoundB = 0xCD9E8D57u, kKeyA = 0x9E3779B9u, kKeyB = 0xBB67AE85u;
constexpr int kCounters = 64;               // counters a block
constexpr int kNormals = 4 * kCounters;     // normals a block

// Vectors of 64-bit lanes, a 32-bit word in the low half of each. The product of two words fills a lane, so the next
// round's multiplication finds its factor in place; what is left in the upper halves is never read.
#if defined(__AVX512F__)
struct Lanes {
  static constexpr int width = 8;
  __m512i v;
};
inline Lanes counters(uint64_t first) {  // first, first + 2, ...
  return {_mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14))};
}
inline Lanes counters_in_order(uint64_t first) {  // as store_counters wants them
  return {_mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
}
inline Lanes splat(uint32_t word) { return {_mm512_set1_epi64(word)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_epu32(a.v, b.v)}; }
inline Lanes upper(Lanes a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
inline void store_pairs(uint32_t* out, Lanes even, Lanes odd) {
  _mm512_storeu_si512(out, _mm512_mask_blend_epi32(0xAAAA, even.v, _mm512_slli_epi64(odd.v, 32)));
}
inline void store_counters(uint32_t* out, const Lanes (&c)[4]) {  // four words a counter
  const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c[0].v, _mm512_slli_epi64(c[1].v, 32));
  const __m512i high = _mm512_mask_blend_epi32(0xAAAA, c[2].v, _mm512_slli_epi64(c[3].v, 32));
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low, high));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low, high));
}
#elif defined(__AVX2__)
struct Lanes {
  static constexpr int width = 4;
  __m256i v;
};
inline Lanes counters(uint64_t first) {
  return {_mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), _mm256_setr_epi64x(0, 2, 4, 6))};
}
inline Lanes counters_in_order(uint64_t first) {
  return {_mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), _mm256_setr_epi64x(0, 2, 1, 3))};
}
inline Lanes splat(uint32_t word) { return {_mm256_set1_epi64x(word)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm256_mul_epu32(a.v, b.v)}; }
inline Lanes upper(Lanes a) { return {_mm256_srli_epi64(a.v, 32)}; }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
inline void store_pairs(uint32_t* out, Lanes even, Lanes odd) {
  const __m256i both = _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), both);
}
inline void store_counters(uint32_t* out, const Lanes (&c)[4]) {
  const __m256i low = _mm256_blend_epi32(c[0].v, _mm256_slli_epi64(c[1].v, 32), 0xAA);
  const __m256i high = _mm256_blend_epi32(c[2].v, _mm256_slli_epi64(c[3].v, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(low, high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(low, high));
}
#else
struct Lanes {
  static constexpr int width = 1;
  uint64_t v;
};
inline Lanes counters(uint64_t first) { return {first}; }
inline Lanes counters_in_order(uint64_t first) { return {first}; }
inline Lanes splat(uint32_t word) { return {word}; }
inline Lanes multiply(Lanes a, Lanes b) { return {(a.v & 0xFFFFFFFFu) * (b.v & 0xFFFFFFFFu)}; }
inline Lanes upper(Lanes a) { return {a.v >> 32}; }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return {a.v ^ b.v ^ c.v}; }
inline void store_pairs(uint32_t* out, Lanes even, Lanes odd) { out[0] = uint32_t(even.v), out[1] = uint32_t(odd.v); }
inline void store_counters(uint32_t* out, const Lanes (&c)[4]) {
  for (int word = 0; word < 4; ++word) out[word] = uint32_t(c[word].v);
}
#endif

// Ten rounds on four vectors of counters, whose 64 bits stand in c[k][0].
inline void philox_rounds(Lanes (&c)[4][4], uint32_t key0, uint32_t key1) {
  const Lanes round_a = splat(kRoundA), round_b = splat(kRoundB);
  for (int k = 0; k < 4; ++k) {
    c[k][1] = upper(c[k][0]);
    c[k][2] = c[k][3] = splat(0);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes a = splat(key0), b = splat(key1);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Lanes product_a = multiply(c[k][0], round_a), product_b = multiply(c[k][2], round_b);
      c[k][0] = xor3(upper(product_b), c[k][1], a);
      c[k][2] = xor3(upper(product_a), c[k][3], b);
      c[k][1] = product_b;
      c[k][3] = product_a;
    }
    key0 += kKeyA, key1 += kKeyB;
  }
}

// The four words of counters first .. first + 63, word by word.
inline void philox_block(uint64_t first, uint32_t key0, uint32_t key1, uint32_t (&words)[4][kCounters]) {
  constexpr int step = 4 * Lanes::width < kCounters ? 4 * Lanes::width : kCounters;  // counters in flight
  for (int i = 0; i < kCounters; i += step) {
    Lanes c[4][4];  // [even and odd counters, twice][word]
    for (int k = 0; k < 4; ++k) c[k][0] = counters(first + uint64_t(i + k / 2 * (step / 2) + k % 2));
    philox_rounds(c, key0, key1);
    for (int word = 0; word < 4; ++word) {
      store_pairs(&words[word][i], c[0][word], c[1][word]);
      store_pairs(&words[word][i + step / 2], c[2][word], c[3][word]);
    }
  }
}

constexpr int64_t kWords = 4 * 4 * Lanes::width;  // words in flight

// Words that `stream` may write for `count` words: whole steps, and the lanes before the first position.
constexpr int64_t stream_room(int64_t count) { return (count + 3 + kWords - 1) / kWords * kWords; }

// The words at positions position .. position + count - 1 of the seed's stream; they lie at the returned pointer,
// inside `room` (stream_room(count) words).
__attribute__((noinline)) inline const uint32_t* stream(uint32_t* room, uint64_t position, int64_t count, int64_t seed) {
  const uint32_t k0 = uint32_t(uint64_t(seed)), k1 = uint32_t(uint64_t(seed) >> 32);
  const int64_t lead = int64_t(position % 4);
  for (int64_t done = 0; done < lead + count; done += kWords) {
    Lanes c[4][4];
    for (int k = 0; k < 4; ++k) c[k][0] = counters_in_order((position + uint64_t(done)) / 4 + uint64_t(k * Lanes::width));
    philox_rounds(c, k0, k1);
    for (int k = 0; k < 4; ++k) store_counters(room + done + k * 4 * Lanes::width, c[k]);
  }
  return room + lead;
}

// Floats that `normals` may write for `count` normals: whole blocks, and the lanes before the first position.
constexpr int64_t normals_room(int64_t count) { return (count + 3 + kNormals - 1) / kNormals * kNormals; }

// The normals at positions position .. position + count - 1 of the seed's stream; they lie at the returned pointer,
// inside `room` (normals_room(count) floats).
__attribute__((noinline)) inline const float* normals(float* room, uint64_t position, int64_t count, int64_t seed) {
  const uint32_t k0 = uint32_t(uint64_t(seed)), k1 = uint32_t(uint64_t(seed) >> 32);
  const int64_t lead = int64_t(position % 4);
  uint32_t words[4][kCounters];
  float lanes[4][kCounters];
  for (int64_t done = 0; done < lead + count; done += kNormals) {
    philox_block((position + uint64_t(done)) / 4, k0, k1, words);
    for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
      for (int i = 0; i < kCounters; ++i) {
        const float u = (float(int32_t(words[pair][i] >> 9)) + 0.5f) * 0x1p-23f;
        const float radius = __builtin_sqrtf(minus_two_log(u));
        float sine, cosine;
        sincos_turn(words[pair + 1][i], sine, cosine);
        lanes[pair][i] = radius * cosine;
        lanes[pair + 1][i] = radius * sine;
      }
    }
    float* out = room + done;
    for (int i = 0; i < kCounters; ++i) {
      for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = lanes[lane][i];
    }
  }
  return room + lead;
}

}  // namespace
