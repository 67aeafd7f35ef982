// Rows written past the caches: memory that they do not hold need not be read before it is overwritten.
#pragma once
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kStreamed = int64_t(1) << 21;  // elements: four tensors of them are 32 MiB, a large cache

// Copies; call `streams_done` on the same thread before another one reads the result.
GENAI_FAST_ONCE inline void stream_span(float* out, const float* in, int64_t count) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  constexpr int64_t kLanesOfStore = 16;
#elif defined(__AVX__)
  constexpr int64_t kLanesOfStore = 8;
#else
  constexpr int64_t kLanesOfStore = 4;
#endif
  int64_t i = 0;
  for (; i < count && uintptr_t(out + i) % (4 * kLanesOfStore); ++i) out[i] = in[i];
  for (; i + kLanesOfStore <= count; i += kLanesOfStore) {
#if defined(__AVX512F__)
    _mm512_stream_ps(out + i, _mm512_loadu_ps(in + i));
#elif defined(__AVX__)
    _mm256_stream_ps(out + i, _mm256_loadu_ps(in + i));
#else
    _mm_stream_ps(out + i, _mm_loadu_ps(in + i));
#endif
  }
  for (; i < count; ++i) out[i] = in[i];
#else
  std::memcpy(out, in, size_t(count) * 4);
#endif
}

inline void streams_done() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// DenseOut, which writes large float32 tensors past the caches: `begin` then always gives the buffer.
struct StreamedOut {
  DenseOut out;
  bool streamed;

  StreamedOut(void* data, int64_t rows, int64_t columns, int dtype)
      : out{data, columns, dtype}, streamed(dtype == kFloat32 && rows * columns >= kStreamed) {}
  float* begin(const Piece& p, float* buffer) const { return streamed ? buffer : out.begin(p, buffer); }
  void end(const Piece& p, const float* values) const {
    if (streamed) {
      stream_span(static_cast<float*>(out.data) + p.row * out.columns + p.column, values, p.count());
    } else {
      out.end(p, values);
    }
  }
};

}  // namespace
