// Fused advantages for CPU buffers: rewards in, advantages and group statistics out. No Python here.
//
// Three values under the names that they have in Python and Triton: Rollouts, Groups, Options.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include "v05/fusion.hpp"
#include "v05/grouping.hpp"
#include "v05/moments.hpp"

namespace v05 {

// Shared by number with v05.ops.
enum class Scale : std::uint8_t { kNone = 0, kGroup = 1, kBatch = 2, kMean = 3 };

// How rewards become advantages. The defaults are those of v05.ops.
struct Options {
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

  [[nodiscard]] bool bounded() const { return needs_prior(baseline); }
  [[nodiscard]] bool wants_batch() const { return scale == Scale::kBatch || needs_batch(baseline); }
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

// What a buffer holds. Shared by number with v05.ops.
enum class Dtype : std::uint8_t { kNone = 0, kBytes = 1, kInt64 = 2, kFloat32 = 3, kFloat64 = 4, kInt32 = 5 };

// A caller's contiguous memory, whose type is known when it is read. `name` is the argument that it came by.
struct Buffer {
  void* data = nullptr;
  Dtype dtype = Dtype::kNone;
  std::size_t size = 0;  // elements
  const char* name = "";

  [[nodiscard]] explicit operator bool() const { return dtype != Dtype::kNone; }
  template <class T>
  [[nodiscard]] std::span<T> as() const {
    return {static_cast<T*>(data), size};
  }
};

// N rollouts as they are given.
struct Rollouts {
  Buffer rewards;                                // (N,), or (N, T) by token: float32 or float64
  Buffer mask;                                   // (N, T) where rewards or advantages are by token; none else
  std::span<const std::int64_t> cu_seqlens;      // (N + 1,) where advantages are packed; empty else
  std::span<const std::uint8_t> valid;           // (N,); empty: all
  std::span<const std::int64_t> trajectory_ids;  // (N,); empty: every row is a trajectory of its own
  std::span<const double> energy;                // (N,), at least 0; empty where no baseline reads it
  std::size_t count = 0;                         // N
  bool by_token = false;                         // rewards are (N, T)
};

// The same with one reward each, as statistics and baselines read them.
template <class Real>
struct Outcomes {
  std::span<const Real> rewards;
  std::span<const std::uint8_t> valid;
  std::span<const std::int64_t> trajectory_ids;
  std::span<const double> energy;

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(rewards.size()); }
  [[nodiscard]] bool is_valid(std::size_t row) const { return valid.empty() || valid[row] != 0; }
  [[nodiscard]] bool is_usable(std::size_t row) const { return is_valid(row) && std::isfinite(rewards[row]); }
};

// The columns of the table of statistics, in the order that v05.ops and the kernel read too.
enum class Statistic : std::uint8_t {
  kCount,
  kNonfinite,
  kClipped,
  kMean,
  kVar,
  kBaseline,
  kMse,
  kWeight,
  kStatistic,
  kHallucination,
  kTakeMore,
};
inline constexpr std::array<const char*, 11> kStatistics{
    "count", "nonfinite", "clipped",   "mean",          "var",       "baseline",
    "mse",   "weight",    "statistic", "hallucination", "take_more",
};

// Where the statistics of each group go, whole numbers too. A column that the baseline does not define is not written.
struct Table {
  double* data = nullptr;  // (columns, groups); null if nobody asked
  std::size_t groups = 0;

  [[nodiscard]] explicit operator bool() const { return data != nullptr; }
  [[nodiscard]] double& at(Statistic column, std::size_t group) const {
    return data[static_cast<std::size_t>(column) * groups + group];
  }
};

// Writes the advantages into `out`, in the layout of the rollouts, and the statistics into `table`; a row left out has
// advantage 0. At most `threads` threads, the same bits on any number of them. Contiguous groups need no scratch,
// others a few numbers a group; trajectories a map of their ids. `out` shares no memory with what is read. Throws
// std::invalid_argument that names the argument, the rows and the remedy, before it has written anything, but for the
// values of a mask, which are checked as `out` is written.
void compute_advantages(const Rollouts& rollouts, const Groups& groups, std::span<const double> prior,
                        const Options& options, const Buffer& out, const Table& table, int threads);

}  // namespace v05
