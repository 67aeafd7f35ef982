// Memory that a kernel needs while it runs. What cannot be had raises MemoryError; nothing may be thrown inside a parallel
// region, so all of it is taken before one, that of its threads too.
#pragma once
#include <cstdint>
#include <cstdlib>

#include <omp.h>

#include "kernel.h"

namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line, and of the longest vector

// `count` uninitialised elements, freed at the end of the scope: aligned to a line, with another line after the last one
// for what writes whole vectors. None if there are none.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) {
    if (count == 0) return;
    int64_t bytes;
    const bool fits = !__builtin_mul_overflow(count, int64_t(sizeof(T)), &bytes) && bytes > 0;
    block_ = fits && bytes < INT64_MAX - 2 * kLine ? std::malloc(size_t(bytes + 2 * kLine)) : nullptr;
    if (!block_) genai_fast_raise(Raised::kMemoryError, "expected memory for %lld numbers, got none", (long long)count);
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block_) + kLine - 1) / kLine * kLine);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(block_); }
  operator T*() const { return data_; }

 private:
  void* block_ = nullptr;
  T* data_ = nullptr;
};

// Floats in whole lines, one more than `count` needs: what several pieces of memory take in one block.
constexpr int64_t in_lines(int64_t count) { return (count + 31) / 16 * 16; }

// `count` floats for each of a region's threads.
class Scratch {
 public:
  Scratch(int64_t count, bool parallel, int threads)
      : each_(count ? in_lines(count) : 0), all_(each_ * (parallel ? threads : 1)) {}
  float* mine() const { return all_ + omp_get_thread_num() * each_; }

 private:
  int64_t each_;
  Memory<float> all_;
};

}  // namespace
