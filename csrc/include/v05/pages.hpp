// Faster use of fresh memory: a page fault for every 4 KiB costs more than writing them. No Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace v05 {

// Asks for 2 MiB pages for `out`, which is about to be written in full. It is a hint that the system may ignore, and
// has no effect on memory that is mapped already.
template <class Out>
void prefer_huge_pages([[maybe_unused]] std::span<Out> out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kHugePage = std::size_t{1} << 21U;
  const auto begin = reinterpret_cast<std::uintptr_t>(out.data());
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (begin + out.size_bytes()) / kHugePage * kHugePage;
  if (first < last) {  // only whole huge pages: the memory around them belongs to others
    madvise(reinterpret_cast<char*>(out.data()) + (first - begin), last - first, MADV_HUGEPAGE);
  }
#endif
}

// `size` elements of zero bytes, which must be a valid state of T. They start on a cache line, so that an element of 8,
// 16, 32 or 64 bytes never spans two lines.
template <class T>
class Scratch {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Scratch(std::size_t size) : memory_(std::calloc(size + kSpare, sizeof(T))) {
    if (memory_ == nullptr) {  // also if the product overflows
      throw std::bad_alloc();
    }
    void* first = memory_.get();
    std::size_t space = (size + kSpare) * sizeof(T);
    data_ = static_cast<T*>(std::align(kLine, size * sizeof(T), first, space));
    prefer_huge_pages(std::span<T>(data_, size));
  }

  [[nodiscard]] T* data() const { return data_; }

 private:
  static constexpr std::size_t kLine = 64;
  static constexpr std::size_t kSpare = (kLine + sizeof(T) - 1) / sizeof(T);  // extra elements for the alignment
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  T* data_;
};

}  // namespace v05
