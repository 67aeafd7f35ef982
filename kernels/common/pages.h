// Memory that the operating system has yet to hand out.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Asks for huge pages where a large result is about to be written for the first time: it then costs one fault for every
// 2 MiB, not for every 4 KiB. Only a hint, and nothing to memory that is there already.
inline void expect_writes([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLeast = 8 << 20;
  if (bytes < int64_t(kLeast)) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
