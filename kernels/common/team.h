// The threads of one parallel region, and how they wait for each other.
#pragma once
#include <cstdint>

#include <omp.h>
#include <sched.h>

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Of all threads of a team. It spins for some microseconds and then gives its core away: where others want the cores,
// OpenMP's own barrier would spin on, for milliseconds each step.
class Barrier {
 public:
  void wait() {
    const unsigned seen = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation_, seen + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == seen;) {
      if (spins < kSpins) {
        ++spins;
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  int arrived_ = 0;
  unsigned generation_ = 0;
};

// The part [first, last) of `count` things that is this thread's, by whole units.
struct Share {
  int64_t first, last;
  explicit Share(int64_t count, int64_t unit = 1) {
    const int64_t units = (count + unit - 1) / unit, threads = omp_get_num_threads();
    first = least(count, units * omp_get_thread_num() / threads * unit);
    last = least(count, units * (omp_get_thread_num() + 1) / threads * unit);
  }
};

}  // namespace
