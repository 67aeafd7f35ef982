// upfirdn2d on the CPU. Images are dense [planes, height, width, inner], inner being the channels where they lie last.
#include <omp.h>

#include "kernel.h"
#include "memory.h"
#include "rows.h"
#include "team.h"

namespace {

template <int N>
struct Count {
  static constexpr int value = N;
};

inline int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One dimension. The result's pixel o is the sum over t of coefficients[phase][t] x[first + t]: of the taps, those that
// meet pixels and no inserted zero.
struct Axis {
  int64_t size, out, up, down, before, taps;

  int64_t most() const { return over(taps, up); }
  int64_t phase(int64_t o) const {
    const int64_t rest = (before - o * down) % up;
    return rest < 0 ? rest + up : rest;
  }
  int64_t first(int64_t o, int64_t phase) const { return (o * down - before + phase) / up; }
  int64_t first(int64_t o) const { return first(o, phase(o)); }
  int64_t count(int64_t phase) const { return phase < taps ? over(taps - phase, up) : 0; }
  int64_t span() const { return first(out - 1) + most() - first(0); }  // pixels that are asked for, also those outside
};

// out = or += the sum of c[n] rows[n] over N rows.
template <int N, bool Add>
void add_some(const float* const* rows, const float* c, int64_t count, float* out) {
  const float* r[N];
  float w[N];
  for (int n = 0; n < N; ++n) r[n] = rows[n], w[n] = c[n];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float sum = Add ? out[i] : 0.0f;
    for (int n = 0; n < N; ++n) sum += w[n] * r[n][i];
    out[i] = sum;
  }
}

template <bool Add>
void add_up_to_4(const float* const* rows, const float* c, int64_t n, int64_t count, float* out) {
  if (n == 1) return add_some<1, Add>(rows, c, count, out);
  if (n == 2) return add_some<2, Add>(rows, c, count, out);
  if (n == 3) return add_some<3, Add>(rows, c, count, out);
  return add_some<4, Add>(rows, c, count, out);
}

// out = the sum of c[k] row(k) over n taps, or added to it.
template <class Row>
void add_rows(Row row, const float* c, int64_t n, int64_t count, float* out, bool add) {
  if (!n && !add) {
    for (int64_t i = 0; i < count; ++i) out[i] = 0.0f;
  }
  for (int64_t k = 0; k < n; k += 4) {
    const float* rows[4];
    const int64_t some = least(4, n - k);
    for (int64_t i = 0; i < some; ++i) rows[i] = row(k + i);
    if (add || k) {
      add_up_to_4<true>(rows, c + k, some, count, out);
    } else {
      add_up_to_4<false>(rows, c + k, some, count, out);
    }
  }
}

// Two phases of N taps each, or every second pixel, of one channel: out[2 i + p] or out[i].
template <int N, bool Add>
void doubled(const float* even, const float* odd, const float* c, const float* d, int64_t pairs, float* out) {
  float a[N], b[N];
  for (int n = 0; n < N; ++n) a[n] = c[n], b[n] = d[n];
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    float first = Add ? out[2 * i] : 0.0f, second = Add ? out[2 * i + 1] : 0.0f;
    for (int n = 0; n < N; ++n) first += a[n] * even[i + n], second += b[n] * odd[i + n];
    out[2 * i] = first, out[2 * i + 1] = second;
  }
}

template <int N, bool Add>
void halved(const float* in, const float* c, int64_t count, float* out) {
  float a[N];
  for (int n = 0; n < N; ++n) a[n] = c[n];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float sum = Add ? out[i] : 0.0f;
    for (int n = 0; n < N; ++n) sum += a[n] * in[2 * i + n];
    out[i] = sum;
  }
}

// f(Count<n>) for 1 to 6 taps; false for others.
template <class F>
bool with_count(int64_t n, F f) {
  switch (n) {
    case 1: f(Count<1>{}); return true;
    case 2: f(Count<2>{}); return true;
    case 3: f(Count<3>{}); return true;
    case 4: f(Count<4>{}); return true;
    case 5: f(Count<5>{}); return true;
    case 6: f(Count<6>{}); return true;
  }
  return false;
}

// One line of the result from one of the input, which begins at pixel `low`, with zeros outside. Coefficients by phase.
struct Line {
  Axis axis;
  int64_t inner, low;

  template <bool Add>
  void run(const float* in, const float* c, float* out) const {
    if (axis.up == 1 && axis.down == 1) {
      return add_rows([=](int64_t k) { return in + k * inner; }, c, axis.taps, axis.out * inner, out, Add);
    }
    if (inner == 1 && axis.up == 2 && axis.down == 1 && pairs<Add>(in, c, out)) return;
    if (inner == 1 && axis.up == 1 && axis.down == 2 &&
        with_count(axis.taps, [&](auto n) { halved<n.value, Add>(in, c, axis.out, out); })) {
      return;
    }
    for (int64_t o = 0; o < axis.out; ++o) pixel<Add>(in, c, o, out + o * inner);
  }

 private:
  template <bool Add>
  bool pairs(const float* in, const float* c, float* out) const {
    const int64_t p = axis.phase(0), q = 1 - p, n = axis.count(p);
    if (n != axis.count(q)) return false;
    const bool done = with_count(n, [&](auto count) {
      const float *const even = in + axis.first(0) - low, *const odd = in + axis.first(1) - low;
      doubled<count.value, Add>(even, odd, c + p * axis.most(), c + q * axis.most(), axis.out / 2, out);
    });
    if (done && axis.out % 2) pixel<Add>(in, c, axis.out - 1, out + axis.out - 1);
    return done;
  }

  template <bool Add>
  void pixel(const float* in, const float* c, int64_t o, float* out) const {
    const int64_t phase = axis.phase(o), n = axis.count(phase);
    const float* const from = in + (axis.first(o, phase) - low) * inner;
    c += phase * axis.most();
    if (inner >= 8) return add_rows([=](int64_t k) { return from + k * inner; }, c, n, inner, out, Add);
    for (int64_t i = 0; i < inner; ++i) {
      float sum = Add ? out[i] : 0.0f;
      for (int64_t k = 0; k < n; ++k) sum += c[k] * from[k * inner + i];
      out[i] = sum;
    }
  }
};

// Taps as `Axis` counts them, [up, most]: times gain, and turned unless `flip`.
void by_phase(const Axis& axis, const float* filter, float gain, bool flip, float* c) {
  for (int64_t p = 0; p < axis.up; ++p) {
    for (int64_t t = 0; t < axis.count(p); ++t) {
      const int64_t k = p + t * axis.up;
      c[p * axis.most() + t] = gain * filter[flip ? k : axis.taps - 1 - k];
    }
  }
}

struct Image {
  const void* x;
  int dtype;
  int64_t inner;
  Axis down, along;  // vertical, horizontal
  bool separable;
  const float *rows, *columns;  // coefficients: [up, most] vertically if separable; [up, most], or one such for each tap
  // Of a line from pixel low on: its numbers, the first pixel that is there, the numbers that are, and where they begin.
  int64_t most, low, wide, begin, here, start;

  Image(const void* x_, int dtype_, int64_t inner_, const Axis& down_, const Axis& along_, bool separable_,
        const float* rows_, const float* columns_)
      : x(x_), dtype(dtype_), inner(inner_), down(down_), along(along_), separable(separable_), rows(rows_),
        columns(columns_), most(down.most()), low(along.first(0)), wide(along.span() * inner), begin(low > 0 ? low : 0) {
    const int64_t end = least(along.size, low + along.span());
    here = end > begin ? (end - begin) * inner : 0;
    start = here ? (begin - low) * inner : 0;
  }
  bool direct() const { return separable && dtype == kFloat32; }  // lines are read where they lie
  int64_t lines() const { return direct() ? 0 : most; }           // that are kept as float32
};

// Lines of a plane as float32 with zeros around: the last few are kept, since a line of the result reads several.
class Lines {
 public:
  Lines(const Image& image, float* memory, int64_t* held) : image_(image), memory_(memory), held_(held) {
    for (int64_t k = 0; k < image.lines(); ++k) held_[k] = -1;
    for (int64_t i = 0; i < image.lines() * image.wide; ++i) memory_[i] = 0.0f;
  }
  const float* line(int64_t plane, int64_t y) {
    const int64_t number = plane * image_.down.size + y, slot = y % image_.most;
    float* const found = memory_ + slot * image_.wide;
    if (held_[slot] != number) {
      held_[slot] = number;
      const int64_t from = (number * image_.along.size + image_.begin) * image_.inner;
      load_span(image_.x, image_.dtype, from, image_.here, found + image_.start);
    }
    return found;
  }

 private:
  const Image& image_;
  float* memory_;
  int64_t* held_;
};

// Line oy of a plane's result: vertically into a buffer, then along it; or tap by tap, if the filter is no product.
void one_line(const Image& image, const Line& line, Lines& lines, int64_t plane, int64_t oy, float* buffer, float* out) {
  const Axis& down = image.down;
  const int64_t phase = down.phase(oy), first = down.first(oy, phase), n = down.count(phase);
  const int64_t skipped = first < 0 ? -first : 0, last = least(n, down.size - first);
  const int64_t begin = skipped < last ? skipped : last > 0 ? last : 0, count = last > begin ? last - begin : 0;
  if (image.separable) {
    const float* const c = image.rows + phase * image.most + begin;
    if (image.direct()) {
      const float* const x = static_cast<const float*>(image.x);
      const int64_t pitch = image.along.size * image.inner, top = plane * down.size + first + begin;
      const float* const from = x + top * pitch + image.begin * image.inner;
      add_rows([=](int64_t k) { return from + k * pitch; }, c, count, image.here, buffer + image.start, false);
    } else {
      add_rows([&](int64_t k) { return lines.line(plane, first + begin + k); }, c, count, image.wide, buffer, false);
    }
    return line.run<false>(buffer, image.columns, out);
  }
  if (!count) {
    for (int64_t i = 0; i < image.along.out * image.inner; ++i) out[i] = 0.0f;
  }
  for (int64_t k = 0; k < count; ++k) {
    const int64_t tap = phase + (begin + k) * down.up;
    const float* const c = image.columns + tap * image.along.up * image.along.most();
    const float* const in = lines.line(plane, first + begin + k);
    if (k) {
      line.run<true>(in, c, out);
    } else {
      line.run<false>(in, c, out);
    }
  }
}

// y = the image with up - 1 zeros after each pixel, padded or cropped, convolved with the filter, every down-th pixel,
// times gain. filter [taps, taps], or, if separable, one for both directions.
void upfirdn2d(const void* x, int dtype, const float* filter, bool separable, void* y, int64_t planes, int64_t inner,
               int64_t height, int64_t out_height, int64_t up_y, int64_t down_y, int64_t top, int64_t taps_y,
               int64_t width, int64_t out_width, int64_t up_x, int64_t down_x, int64_t left, int64_t taps_x,
               double gain, bool flip, int threads) {
  const Axis down{height, out_height, up_y, down_y, top, taps_y}, along{width, out_width, up_x, down_x, left, taps_x};
  const int64_t each = along.up * along.most();
  const Memory<float> rows(down.up * down.most()), columns(separable ? each : taps_y * each);
  if (separable) {
    by_phase(down, filter, float(gain), flip, rows);
    by_phase(along, filter, 1.0f, flip, columns);
  } else {
    for (int64_t k = 0; k < taps_y; ++k) {
      by_phase(along, filter + (flip ? k : taps_y - 1 - k) * taps_x, float(gain), flip, columns + k * each);
    }
  }
  const Image image(x, dtype, inner, down, along, separable, rows, columns);
  const Line line{along, inner, image.low};
  const int64_t wide = image.wide, long_row = along.out * inner;
  const int64_t share = least(out_height, over(kParallel, long_row)), parts = over(out_height, share);
  const bool parallel = planes * out_height * long_row >= kParallel;
  const int64_t slots = in_lines(2 * image.lines());
  const Scratch scratch(in_lines(wide) + in_lines(long_row) + slots + image.lines() * wide, parallel, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t item = 0; item < planes * parts; ++item) {
    const int64_t plane = item / parts, from = item % parts * share, to = least(out_height, from + share);
    float* const buffer = scratch.mine();
    float* const narrow = buffer + in_lines(wide);
    int64_t* const held = reinterpret_cast<int64_t*>(narrow + in_lines(long_row));
    for (int64_t i = 0; i < wide; ++i) buffer[i] = 0.0f;
    Lines lines(image, narrow + in_lines(long_row) + slots, held);
    for (int64_t oy = from; oy < to; ++oy) {
      const int64_t at = (plane * out_height + oy) * long_row;
      float* const out = dtype == kFloat32 ? static_cast<float*>(y) + at : narrow;
      one_line(image, line, lines, plane, oy, buffer, out);
      if (dtype != kFloat32) store_span(y, dtype, at, long_row, narrow);
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&upfirdn2d>::named("upfirdn2d"),
    {},
};
