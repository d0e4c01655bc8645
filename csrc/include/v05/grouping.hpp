// Which rows belong together: keys of any kind, numbered by first appearance. No Python.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

namespace v05 {

// Rows and groups are counted in 32 bits where tables of them should fit the cache.
inline constexpr std::size_t kMostRows = std::numeric_limits<std::int32_t>::max();

// Ids and offsets lie in the caller's memory, where another thread may change them after they were checked. Whoever
// takes one for a place in memory reads it by this function: once, and cut to the `size` of that memory. A negative one
// is larger than any size.
inline std::size_t within(std::uint64_t place, std::size_t size) {
  asm("" : "+r"(place));  // It lies in a register: the compiler does not read the memory again.
  return std::min<std::size_t>(place, size);
}

// The elements begin .. end - 1; none where the end lies before the beginning.
struct Part {
  std::size_t begin;
  std::size_t end;
};

// The part that starts at offsets[number], of `size` elements in all.
inline Part part_of(std::span<const std::int64_t> offsets, std::size_t number, std::size_t size) {
  return {
      .begin = within(static_cast<std::uint64_t>(offsets[number]), size),
      .end = within(static_cast<std::uint64_t>(offsets[number + 1]), size),
  };
}

// Numbers the keys of rows by first appearance into `slots` and returns how many there are. hash_of(row) is 64 well
// mixed bits; same(a, b) tells whether two rows of equal hash hold the same key. A flat table (linear probing, at most
// half full) whose lines are fetched a batch ahead: a table of a million keys is far larger than a cache.
template <class Slot, class HashOf, class Same>
std::int64_t number_by_appearance(std::span<Slot> slots, const HashOf& hash_of, const Same& same) {
  if (slots.size() > kMostRows) {
    throw std::invalid_argument("group_ids: more than 2^31 - 1 rows. Split the batch.");
  }
  struct Entry {
    std::uint64_t hash = 0;
    std::int32_t first_row = 0;
    std::int32_t slot = -1;  // negative: no key
  };
  constexpr std::size_t kBatch = 32;
  std::vector<Entry> table(1024);
  const auto grow = [&table] {
    std::vector<Entry> larger(4 * table.size());
    for (const Entry& entry : table) {
      if (entry.slot >= 0) {
        std::size_t place = entry.hash & (larger.size() - 1);
        while (larger[place].slot >= 0) {
          place = (place + 1) & (larger.size() - 1);
        }
        larger[place] = entry;
      }
    }
    table.swap(larger);
  };

  std::array<std::uint64_t, kBatch> hashes{};
  std::int32_t found = 0;
  for (std::size_t begin = 0; begin < slots.size(); begin += kBatch) {
    const std::size_t end = std::min(slots.size(), begin + kBatch);
    if (2 * (static_cast<std::size_t>(found) + kBatch) > table.size()) {
      grow();
    }
    const std::size_t mask = table.size() - 1;
    for (std::size_t row = begin; row < end; ++row) {
      hashes[row - begin] = hash_of(row);
      __builtin_prefetch(&table[hashes[row - begin] & mask]);
    }
    for (std::size_t row = begin; row < end; ++row) {
      const std::uint64_t hash = hashes[row - begin];
      std::size_t place = hash & mask;
      while (table[place].slot >= 0 &&
             !(table[place].hash == hash && same(static_cast<std::size_t>(table[place].first_row), row))) {
        place = (place + 1) & mask;
      }
      if (table[place].slot < 0) {
        table[place] = {.hash = hash, .first_row = static_cast<std::int32_t>(row), .slot = found++};
      }
      slots[row] = table[place].slot;
    }
  }
  return found;
}

// Numbers ids of any value by first appearance and returns how many there are.
std::int64_t number_ids(std::span<const std::int64_t> ids, std::span<std::int64_t> numbers);

// Whether the first offset is 0 and none is smaller than the one before it.
bool rise_from_zero(std::span<const std::int64_t> offsets);

// std::invalid_argument that names the rows whose id is not in [0, num_groups).
void check_ids(std::span<const std::int64_t> ids, std::int64_t num_groups);

// Group g has the rows order[offsets[g]] .. order[offsets[g + 1] - 1], in their own order. `offsets` (groups + 1) are
// zeros; rows whose id was changed to no group's since they were checked are put into the last one.
void order_rows(std::span<const std::int64_t> ids, std::span<std::int64_t> offsets, std::span<std::int64_t> order);

}  // namespace v05
