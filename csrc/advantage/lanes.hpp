// Groups of one size side by side, a group in each lane of a register: what a batch of many small groups is made of.
#pragma once

#include <cstddef>
#include <span>

#include "v05/advantage.hpp"

namespace v05 {

// Whether groups of these options can be judged by `judge_lanes`: each by its own rewards and its prior alone, no
// rollout for itself.
bool fits_lanes(const Options& options);

// Judges groups from `begin` on, as long as the next ones have one size that there is code for, and returns how many.
// All rows count. The bits are those of a group judged by itself.
template <class Real, class Out>
std::size_t judge_lanes(std::span<const Real> rewards, std::span<const std::int64_t> offsets,
                        std::span<const double> prior, const Options& options, std::span<Out> advantages,
                        const Table& table, std::size_t begin, std::size_t end);

}  // namespace v05
