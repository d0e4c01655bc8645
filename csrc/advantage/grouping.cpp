#include "v05/grouping.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <vector>

#include "v05/group_ids.hpp"
#include "v05/multiversion.hpp"
#include "v05/offenders.hpp"

namespace v05 {
namespace {

struct Range {
  std::int64_t lowest = std::numeric_limits<std::int64_t>::max();
  std::int64_t highest = std::numeric_limits<std::int64_t>::min();

  // The number of integers in the range minus 1, because there may be 2^64 of them.
  [[nodiscard]] std::uint64_t last_index() const {
    return static_cast<std::uint64_t>(highest) - static_cast<std::uint64_t>(lowest);
  }
};

V05_MULTIVERSION Range range_of(const std::int64_t* ids, std::size_t rows) {
  std::int64_t lowest = Range{}.lowest;
  std::int64_t highest = Range{}.highest;
  for (std::size_t i = 0; i < rows; ++i) {
    lowest = std::min(lowest, ids[i]);
    highest = std::max(highest, ids[i]);
  }
  return {.lowest = lowest, .highest = highest};
}

// Numbers ids of a small range by a table over the range. It needs no hash, no comparison of ids and no branch for new
// ids.
std::int64_t number_within(const Range& range, std::span<const std::int64_t> ids, std::span<std::int64_t> slots) {
  std::vector<std::int32_t> slot_of(range.last_index() + 1, -1);
  const auto lowest = static_cast<std::uint64_t>(range.lowest);
  std::int32_t found = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    std::int32_t& slot = slot_of[within(static_cast<std::uint64_t>(ids[i]) - lowest, range.last_index())];
    const bool is_new = slot < 0;
    slot = is_new ? found : slot;
    found += static_cast<std::int32_t>(is_new);
    slots[i] = slot;
  }
  return found;
}

std::int64_t number_any(std::span<const std::int64_t> ids, std::span<std::int64_t> slots) {
  const auto hash_of = [&](std::size_t row) { return mix(static_cast<std::uint64_t>(ids[row])); };
  // mix is a bijection, so ids with equal hashes are equal.
  return number_by_appearance(slots, hash_of, [](std::size_t /*a*/, std::size_t /*b*/) { return true; });
}

}  // namespace

bool rise_from_zero(std::span<const std::int64_t> offsets) {
  if (offsets.empty() || offsets.front() != 0) {
    return false;
  }
  std::uint64_t bits = 0;  // the bits of all offsets and of their differences; the sign bit shows a negative one
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    const auto offset = static_cast<std::uint64_t>(offsets[i]);
    bits |= offset | (offset - static_cast<std::uint64_t>(offsets[i - 1]));
  }
  return std::bit_cast<std::int64_t>(bits) >= 0;
}

void check_ids(std::span<const std::int64_t> ids, std::int64_t num_groups) {
  const Range range = range_of(ids.data(), ids.size());
  if (ids.empty() || (range.lowest >= 0 && range.highest < num_groups)) {
    return;
  }
  Offenders outside;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= num_groups) {
      outside.add(i, static_cast<double>(ids[i]));
    }
  }
  outside.raise("group_ids: outside [0, num_groups=" + std::to_string(num_groups) + ") in rows",
                "With num_groups an id is its group's position; leave num_groups out for ids of any value.");
}

void order_rows(std::span<const std::int64_t> ids, std::span<std::int64_t> offsets, std::span<std::int64_t> order) {
  if (ids.empty()) {
    return;
  }
  const std::size_t last = offsets.size() - 2;
  std::vector<std::int32_t> groups(ids.size());
  for (std::size_t row = 0; row < ids.size(); ++row) {
    const std::size_t group = within(static_cast<std::uint64_t>(ids[row]), last);
    groups[row] = static_cast<std::int32_t>(group);
    ++offsets[group + 1];
  }
  for (std::size_t group = 1; group < offsets.size(); ++group) {
    offsets[group] += offsets[group - 1];
  }
  std::vector<std::int64_t> next(offsets.begin(), offsets.end() - 1);
  for (std::size_t row = 0; row < ids.size(); ++row) {
    order[static_cast<std::size_t>(next[static_cast<std::size_t>(groups[row])]++)] = static_cast<std::int64_t>(row);
  }
}

std::int64_t number_ids(std::span<const std::int64_t> ids, std::span<std::int64_t> numbers) {
  const Range range = range_of(ids.data(), ids.size());
  const bool dense = !ids.empty() && range.last_index() < 4 * ids.size() && ids.size() <= kMostRows;
  return dense ? number_within(range, ids, numbers) : number_any(ids, numbers);
}

}  // namespace v05
