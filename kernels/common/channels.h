// Dense tensors [outer, channels, inner] and sums over all but the channels, in pieces that are combined in order.
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

constexpr int64_t kTile = 8192;  // elements a partial sum: 32 KiB

// Where the partial sums of tiles stand: [groups, channels, per]; `count` elements went into each.
struct Tiles {
  Pieces pieces;
  Channels shape;
  int64_t groups, per;

  explicit Tiles(const Channels& s) : pieces(s.rows(), s.columns(), kTile), shape(s) {
    const bool whole = pieces.per_row == 1;
    groups = s.last() ? (whole ? pieces.count() : s.outer) : s.outer;
    per = s.last() ? 1 : pieces.per_row;
  }
  int64_t size() const { return groups * shape.channels * per; }
  // Of the piece's first row and column; where channels do not lie last, row r's is `per` r further on.
  int64_t index(int64_t k, const Piece& p) const {
    if (!shape.last()) return p.row * per + k % pieces.per_row;
    return (pieces.per_row == 1 ? k : p.row) * shape.channels + p.column;
  }
  double count(int64_t group, int64_t k) const {
    if (!shape.last()) {
      const int64_t rest = shape.inner - k * pieces.size;
      return double(pieces.per_row == 1 ? shape.inner : rest < pieces.size ? rest : pieces.size);
    }
    if (pieces.per_row > 1) return 1.0;
    const int64_t rest = shape.outer - group * pieces.rows_each;
    return double(rest < pieces.rows_each ? rest : pieces.rows_each);
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

}  // namespace
