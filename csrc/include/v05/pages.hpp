// Fresh pages of an output cost more than writing it: a fault for every 4 KiB. No Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace v05 {

// Asks for 2 MiB pages where `out` is not mapped yet and about to be written in full; a hint that may be refused, and
// that changes nothing for memory mapped already.
template <class Out>
void prefer_huge_pages([[maybe_unused]] std::span<Out> out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kHugePage = std::size_t{1} << 21U;
  const auto begin = reinterpret_cast<std::uintptr_t>(out.data());
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (begin + out.size_bytes()) / kHugePage * kHugePage;
  if (first < last) {  // whole huge pages only: neighbours are somebody else's
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace v05
