// Judges several groups of one size at once, one in each lane of a register. This is fast for batches of many small
// groups.
#pragma once

#include <cstddef>
#include <span>

#include "v05/advantage.hpp"

namespace v05 {

// Whether `judge_lanes` supports these options: the baseline depends only on the group's rewards and prior, and is the
// same for all its rollouts.
bool fits_lanes(const Options& options);

// Judges groups from `begin` on, as long as they have one size that is supported, and returns their number. All rows
// must be usable. The results have the same bits as those of one group at a time.
template <class Real, class Out>
std::size_t judge_lanes(std::span<const Real> rewards, std::span<const std::int64_t> offsets,
                        std::span<const double> prior, const Options& options, std::span<Out> advantages,
                        const Table& table, std::size_t begin, std::size_t end);

}  // namespace v05
