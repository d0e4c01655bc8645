// Loops over the rows of groups, and the selection of rows that count.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "v05/advantage.hpp"

namespace v05 {

constexpr std::int64_t kPrefetchAhead = 32;

// Calls body(row, group of the row) for all rows that belong to a group.
template <class Body>
void for_rows(std::size_t rows, const Groups& groups, const Body& body) {
  const std::size_t count = static_cast<std::size_t>(groups.count);
  if (groups.offsets.empty()) {
    for (std::size_t row = 0; row < rows; ++row) {
      if (const std::size_t group = groups.named_by(row); group < count) {
        body(row, group);
      }
    }
    return;
  }
  for (std::size_t group = 0; group < count; ++group) {
    const Part own = part_of(groups.offsets, group, rows);
    for (std::size_t row = own.begin; row < own.end; ++row) {
      body(row, group);
    }
  }
}

// Calls body(row, table[id of the row]) for the rows begin .. end - 1. Entries are prefetched, because the hardware
// cannot predict their addresses. The table has one entry more than there are groups, for ids that another thread has
// made invalid.
template <class Entry, class Body>
[[gnu::flatten]] void for_scattered(const Groups& groups, std::int64_t begin, std::int64_t end, Entry* table,
                                    const Body& body) {
  for (std::int64_t row = begin; row < end; ++row) {
    __builtin_prefetch(&table[groups.named_by(static_cast<std::size_t>(std::min(row + kPrefetchAhead, end - 1)))], 1);
    const auto place = static_cast<std::size_t>(row);
    body(place, table[groups.named_by(place)]);
  }
}

// Marks the rows that count in the statistics: the first usable row of each trajectory. Empty without trajectories,
// when all usable rows count. Throws std::invalid_argument if a trajectory has two different rewards.
template <class Real>
std::vector<std::uint8_t> first_of_trajectories(const Outcomes<Real>& outcomes, const Groups& groups);

}  // namespace v05
