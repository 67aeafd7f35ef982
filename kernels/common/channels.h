// Dense tensors [outer, channels, inner], and sums over all but the channels: by tiles, which are combined in order.
#pragma once
#include "rows.h"

namespace {

// The tensor as a matrix: a row holds all channels where they lie last (inner is 1), else one channel's plane.
struct Channels {
  int64_t outer, channels, inner;
  bool last() const { return inner == 1; }
  int64_t rows() const { return last() ? outer : outer * channels; }
  int64_t columns() const { return last() ? channels : inner; }
  int64_t elements() const { return outer * channels * inner; }
  int64_t channel_of(int64_t row) const { return row % channels; }  // where they do not lie last
};

// A value of each channel, seen from a row: its own for each column where channels lie last, else one for all.
template <bool Last>
struct Param {
  const float* values;
  explicit Param(const float* channel) : values(channel) {}
  float operator[](int64_t column) const { return values[column]; }
};
template <>
struct Param<false> {
  float value;
  explicit Param(const float* channel) : value(*channel) {}
  float operator[](int64_t) const { return value; }
};

// An activation's slope, seen from a row: one for all, or each channel's own.
template <bool Own, bool Last>
struct Slope {
  float value;
  Slope(const float*, int64_t, float all) : value(all) {}
  float operator[](int64_t) const { return value; }
};
template <bool Last>
struct Slope<true, Last> : Param<Last> {
  Slope(const float* slopes, int64_t at, float) : Param<Last>(slopes + at) {}
};

constexpr int64_t kTile = 8192;  // elements: 32 KiB, for the caches to hold; no row of a tile is longer

// How sums are cut: whole rows, or parts of long ones. Partial sums stand as [groups, channels, per].
struct Tiles {
  Channels shape;  // small planes of many samples count as columns of their own, which saves a short loop for each
  int64_t channels, width, across, rows_each, groups, per;

  // `elements` a tile of whole or short rows; `part` columns of a long one, in a tile that is written too no fewer than
  // 1024: stores and the next row's loads then lie apart, although their addresses may agree in the lower 12 bits.
  explicit Tiles(const Channels& s, int64_t elements = kTile, int64_t part = 128) : shape(s), channels(s.channels) {
    if (!s.last() && s.inner < 128 && s.outer >= 16) shape = {s.outer, s.channels * s.inner, 1};
    const int64_t columns = shape.columns(), most = shape.last() ? (columns > 1024 ? part : 1024) : kTile;
    width = columns < most ? columns : most;
    across = width ? (columns + width - 1) / width : 0;
    rows_each = across > 1 && !shape.last() ? 1 : width ? elements / width : 1;
    groups = shape.last() ? (shape.outer + rows_each - 1) / rows_each : shape.outer;
    per = shape.last() ? (channels ? shape.channels / channels : 1) : across;
  }
  int64_t count() const { return (shape.rows() + rows_each - 1) / rows_each * across; }
  Piece operator[](int64_t k) const {
    const int64_t row = k / across * rows_each, column = k % across * width;
    const int64_t rows = shape.rows() - row, columns = shape.columns() - column;
    return {row, rows < rows_each ? rows : rows_each, column, columns < width ? columns : width};
  }
  int64_t partials() const { return groups * channels * per; }
  // Of the tile's first row and column; its row r's is `per` r further on where channels do not lie last.
  int64_t partial(const Piece& p) const {
    return shape.last() ? p.row / rows_each * shape.channels + p.column : p.row * per + p.column / width;
  }
  // Elements that went into a partial sum.
  double elements(int64_t group, int64_t k) const {
    const int64_t whole = shape.last() ? rows_each : width;
    const int64_t rest = shape.last() ? shape.outer - group * rows_each : shape.inner - k * width;
    return double(rest < whole ? rest : whole);
  }
};

constexpr int64_t kLanes = 64;  // channels combined at a time

// f(first, count) for spans of at most kLanes channels.
template <class F>
void for_channels(int64_t channels, bool parallel, int threads, F f) {
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t first = 0; first < channels; first += kLanes) {
    f(first, channels - first < kLanes ? channels - first : kLanes);
  }
}

// store(channel, sum) for each channel, of partial sums that stand as `tiles` says; in order, in float64.
template <class Store>
void sum_tiles(const Tiles& tiles, const float* partials, bool parallel, int threads, Store store) {
  for_channels(tiles.channels, parallel, threads, [&](int64_t first, int64_t count) {
    double total[kLanes] = {};
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const float* const tile = partials + (g * tiles.channels + first) * tiles.per + k;
        for (int64_t c = 0; c < count; ++c) total[c] += double(tile[c * tiles.per]);
      }
    }
    for (int64_t c = 0; c < count; ++c) store(first + c, total[c]);
  });
}

// first and second = sums of f(i) (a pair of floats) over i < count, in 64 lanes: one chain would wait for itself.
template <class F>
inline void sum_pairs(int64_t count, F f, float* first, float* second) {
  constexpr int64_t kChains = 64;
  alignas(64) float a[kChains] = {}, b[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
#pragma omp simd
    for (int64_t k = 0; k < kChains; ++k) f(i + k, a[k], b[k]);
  }
#pragma omp simd
  for (int64_t k = 0; k < count - i; ++k) f(i + k, a[k], b[k]);
  for (int64_t half = kChains / 2; half; half /= 2) {
#pragma omp simd
    for (int64_t k = 0; k < half; ++k) a[k] += a[k + half], b[k] += b[k + half];
  }
  *first = a[0], *second = b[0];
}

}  // namespace
