// Loops over several threads. No Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

namespace v05 {

// Below this much work, in elements touched, waking threads costs more than they save.
inline constexpr std::int64_t kSerialWork = 65536;

// Calls body(block, begin, end) for the blocks of `block_size` that cover [0, count). How the range is cut does not
// depend on `threads`, so neither does what a block computes. If bodies throw, the exception of the first block wins.
template <class Body>
void for_blocks(std::int64_t count, std::int64_t block_size, std::int64_t work, int threads, const Body& body) {
  const std::int64_t blocks = (count + block_size - 1) / block_size;
  const bool serial = threads <= 1 || blocks <= 1 || work < kSerialWork;
  std::exception_ptr failure;
  std::int64_t failed_block = blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (!serial)
  for (std::int64_t block = 0; block < blocks; ++block) {
    try {  // an exception must not leave the parallel region
      body(block, block * block_size, std::min(count, (block + 1) * block_size));
    } catch (...) {
#pragma omp critical(v05_for_blocks_failure)
      if (block < failed_block) {
        failed_block = block;
        failure = std::current_exception();
      }
    }
  }
  if (failure) {
    std::rethrow_exception(failure);
  }
}

}  // namespace v05
