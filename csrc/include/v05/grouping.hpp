// Grouping of rows: keys of any kind are numbered by first appearance. No Python.
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

// Tables that should fit the cache count rows and groups in 32 bits.
inline constexpr std::size_t kMostRows = std::numeric_limits<std::int32_t>::max();

// Ids and offsets are in memory of the caller, where another thread may change them after they were checked. So a value
// that is used as an index is read through this function: once, and limited to `size`. A negative value is larger than
// any size.
inline std::size_t within(std::uint64_t place, std::size_t size) {
  asm("" : "+r"(place));  // Forces the value into a register, so that the compiler does not read the memory again.
  return std::min<std::size_t>(place, size);
}

// The elements begin .. end - 1, which are none if end is below begin.
struct Part {
  std::size_t begin;
  std::size_t end;
};

// Part `number` of `size` elements, by its offsets.
inline Part part_of(std::span<const std::int64_t> offsets, std::size_t number, std::size_t size) {
  return {
      .begin = within(static_cast<std::uint64_t>(offsets[number]), size),
      .end = within(static_cast<std::uint64_t>(offsets[number + 1]), size),
  };
}

// Numbers the keys of rows by first appearance, writes the numbers to `slots` and returns the number of keys.
// hash_of(row) must return 64 well mixed bits. same(a, b) tells whether two rows with equal hashes have the same key.
// The hash table is flat (linear probing, at most half full). Its cache lines are fetched a batch ahead, because a
// table of a million keys is far larger than a cache.
template <class Slot, class HashOf, class Same>
std::int64_t number_by_appearance(std::span<Slot> slots, const HashOf& hash_of, const Same& same) {
  if (slots.size() > kMostRows) {
    throw std::invalid_argument("group_ids: more than 2^31 - 1 rows. Split the batch.");
  }
  struct Entry {
    std::uint64_t hash = 0;
    std::int32_t first_row = 0;
    std::int32_t slot = -1;  // negative if the entry is free
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

// Numbers ids of any value by first appearance and returns the number of distinct ids.
std::int64_t number_ids(std::span<const std::int64_t> ids, std::span<std::int64_t> numbers);

// Whether the first offset is 0 and no offset is smaller than the previous one.
bool rise_from_zero(std::span<const std::int64_t> offsets);

// Throws std::invalid_argument that names the rows whose id is not in [0, num_groups).
void check_ids(std::span<const std::int64_t> ids, std::int64_t num_groups);

// Writes order and offsets so that group g has the rows order[offsets[g]] .. order[offsets[g + 1] - 1], in ascending
// order. `offsets` (groups + 1) must be zeros. A row whose id another thread has made invalid since the check goes to
// the last group.
void order_rows(std::span<const std::int64_t> ids, std::span<std::int64_t> offsets, std::span<std::int64_t> order);

}  // namespace v05
