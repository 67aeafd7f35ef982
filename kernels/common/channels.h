// Dense tensors [outer, channels, inner] cut into pieces; inner is 1 where the channels lie last.
#pragma once
#include "rows.h"

namespace {

// The tensor as a matrix: rows of all channels (inner is 1), else one row a plane, whose channel is row % channels.
struct Channels {
  int64_t outer, channels, inner;
  bool last() const { return inner == 1; }
  int64_t rows() const { return last() ? outer : outer * channels; }
  int64_t columns() const { return last() ? channels : inner; }
  int64_t elements() const { return outer * channels * inner; }
};

}  // namespace
