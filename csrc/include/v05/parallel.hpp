// Loops over several threads. No Python.
#pragma once

#include <algorithm>
#include <cstdint>

namespace v05 {

// With less work than this, in elements touched, waking threads costs more than it saves.
inline constexpr std::int64_t kSerialWork = 65536;

// Calls body(block, begin, end) for the blocks of `block_size` that cover [0, count). The blocks do not depend on
// `threads`, so neither do their results. The body must not throw.
template <class Body>
void for_blocks(std::int64_t count, std::int64_t block_size, std::int64_t work, int threads, const Body& body) {
  const std::int64_t blocks = (count + block_size - 1) / block_size;
  const auto take = [&](std::int64_t block) {
    body(block, block * block_size, std::min(count, (block + 1) * block_size));
  };
  if (threads <= 1 || blocks <= 1 || work < kSerialWork) {  // even a team of one thread has a cost
    for (std::int64_t block = 0; block < blocks; ++block) {
      take(block);
    }
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t block = 0; block < blocks; ++block) {
    take(block);
  }
}

}  // namespace v05
