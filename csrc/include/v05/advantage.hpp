// Fused advantages for CPU buffers: rewards in, advantages and group statistics out. No Python here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "v05/fusion.hpp"
#include "v05/grouping.hpp"
#include "v05/statistics.hpp"

namespace v05 {

// Shared by number with v05.ops.
enum class Scale : std::uint8_t { kNone = 0, kGroup = 1, kBatch = 2 };

struct AdvantageRule {
  Baseline baseline = Baseline::kGroupMean;
  Scale scale = Scale::kNone;
  bool leave_one_out = false;
  bool raw_singleton = false;
  bool exclude_nonfinite = false;
  double low = 0.0;
  double high = 1.0;
  double eps = 1e-6;
  std::int64_t max_rollouts = 16;
  double cost = 1.0 / 256.0;
  Calibration calibration;

  [[nodiscard]] bool bounded() const { return baseline != Baseline::kGroupMean; }
  [[nodiscard]] double half_range() const { return (high - low) / 2.0; }
  [[nodiscard]] double scaled(double reward) const { return (reward - low) / (high - low); }  // to [0, 1]
  [[nodiscard]] double unscaled(double rate) const { return low + (high - low) * rate; }
  // What rounding may do to a mean once it is scaled.
  [[nodiscard]] double scaled_rounding() const {
    return 8.0 * std::numeric_limits<double>::epsilon() * std::max(std::abs(low), std::abs(high)) / (high - low);
  }
  [[nodiscard]] double rounding_slack() const { return v05::rounding_slack(low, high); }
};

// Group g owns the rows offsets[g] .. offsets[g + 1] - 1 or, where there are no offsets, the rows whose id is g.
struct Groups {
  std::span<const std::int64_t> offsets;  // (count + 1,), or empty
  std::span<const std::int64_t> ids;      // (N,) where offsets is empty, in [0, count)
  std::int64_t count = 0;

  // The group that a row's id names; `count` if another thread has changed the id to one that names none.
  [[nodiscard]] std::size_t named_by(std::size_t row) const {
    return within(static_cast<std::uint64_t>(ids[row]), static_cast<std::size_t>(count));
  }
};

template <class Real>
struct Rollouts {
  std::span<const Real> rewards;
  std::span<const std::uint8_t> valid;           // empty: all
  std::span<const std::int64_t> trajectory_ids;  // empty: every row is a trajectory of its own

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(rewards.size()); }
  [[nodiscard]] bool is_valid(std::size_t row) const { return valid.empty() || valid[row] != 0; }
  [[nodiscard]] bool is_usable(std::size_t row) const { return is_valid(row) && std::isfinite(rewards[row]); }
};

// Where statistics go, one element a group, whole numbers too; all empty if nobody asked. Only what the baseline
// defines is written: mse and take_more (0 or 1) by kShrinkage and kCalibrated, weight, statistic and p_value by the
// former, hallucination by the latter. Nothing is clipped here.
struct StatisticsOut {
  std::span<double> count, nonfinite, clipped, mean, variance, baseline;
  std::span<double> mse, weight, statistic, p_value, hallucination, take_more;
};

// Writes one advantage a row (0 for a row left out) and the statistics. At most `threads` threads, the same bits on any
// number of them. Contiguous groups need no table, others a few numbers a group; trajectories a map of their ids. The
// advantages share no memory with what is read. Throws std::invalid_argument that names the argument, the rows and the
// remedy, before it has written anything. Offsets are trusted, ids are not.
template <class Real, class Out>
void compute_advantages(const Rollouts<Real>& rollouts, const Groups& groups, std::span<const double> prior,
                        const AdvantageRule& rule, std::span<Out> advantages, const StatisticsOut& statistics,
                        int threads);

// std::invalid_argument that names the rows of an (N, T) mask that hold anything but 0 and 1.
template <class Mask>
void check_mask(std::span<const Mask> mask, std::size_t rows);

// (N, T) token rewards to N outcomes: sums over the tokens whose mask is 1. The mask is not checked.
template <class Reward, class Mask>
void sum_tokens(std::span<const Reward> rewards, const Mask* mask, std::span<double> sums, int threads);

// N advantages to (N, T): where the mask is 1, else 0. What it reads of the mask it checks, so that `out` is written
// when it throws what check_mask does.
template <class Out, class Mask>
void spread_padded(std::span<const Out> advantages, const Mask* mask, std::span<Out> out, int threads);

// N advantages to packed rows: row i is starts[i] .. starts[i + 1] - 1.
template <class Out>
void spread_packed(std::span<const Out> advantages, std::span<const std::int64_t> starts, std::span<Out> out,
                   int threads);

}  // namespace v05
