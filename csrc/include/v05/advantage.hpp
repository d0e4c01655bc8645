// Fused advantages on CPU buffers: computes advantages and group statistics from rewards. No Python.
//
// Rollouts, Groups and Options have the same names in Python and Triton.
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

// v05.ops.advantage.options.SCALES has the same numbers.
enum class Scale : std::uint8_t { kNone = 0, kGroup = 1, kBatch = 2, kMean = 3 };

// How rewards become advantages. v05.ops has the same defaults.
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
  // A bound on the rounding error of a scaled mean.
  [[nodiscard]] double scaled_rounding() const {
    return 8.0 * std::numeric_limits<double>::epsilon() * std::max(std::abs(low), std::abs(high)) / (high - low);
  }
  [[nodiscard]] double rounding_slack() const { return v05::rounding_slack(low, high); }
};

// Group g has the rows offsets[g] .. offsets[g + 1] - 1 or, without offsets, the rows whose id is g.
struct Groups {
  std::span<const std::int64_t> offsets;  // (count + 1,), or empty
  std::span<const std::int64_t> ids;      // (N,) in [0, count) if offsets is empty
  std::int64_t count = 0;

  // The group of a row by its id. It is `count` if another thread has changed the id to an invalid one.
  [[nodiscard]] std::size_t named_by(std::size_t row) const {
    return within(static_cast<std::uint64_t>(ids[row]), static_cast<std::size_t>(count));
  }
};

// The type of a buffer's elements. v05.ops has the same numbers.
enum class Dtype : std::uint8_t { kNone = 0, kBytes = 1, kInt64 = 2, kFloat32 = 3, kFloat64 = 4, kInt32 = 5 };

// Contiguous memory of the caller, with its type known only at run time. `name` is that of the argument.
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

// N rollouts as the caller passes them.
struct Rollouts {
  Buffer rewards;                                // (N,), or (N, T) by token: float32 or float64
  Buffer mask;                                   // (N, T); empty unless rewards or advantages are by token
  std::span<const std::int64_t> cu_seqlens;      // (N + 1,); empty unless advantages are packed
  std::span<const std::uint8_t> valid;           // (N,); empty if all are valid
  std::span<const std::int64_t> trajectory_ids;  // (N,); empty if every row is a trajectory of its own
  std::span<const double> energy;                // (N,), at least 0; empty if the baseline does not read it
  std::size_t count = 0;                         // N
  bool by_token = false;                         // whether rewards are (N, T)
};

// N rollouts with one reward each, which statistics and baselines read.
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

// The columns of the table of statistics. v05.ops and the Triton kernel have the same order.
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

// The table of group statistics, all stored as double. Columns that the baseline does not define are not written.
struct Table {
  double* data = nullptr;  // (columns, groups); null if statistics are not wanted
  std::size_t groups = 0;

  [[nodiscard]] explicit operator bool() const { return data != nullptr; }
  [[nodiscard]] double& at(Statistic column, std::size_t group) const {
    return data[static_cast<std::size_t>(column) * groups + group];
  }
};

// Writes the advantages into `out`, in the layout of the rollouts, and the statistics into `table`. Excluded rows have
// advantage 0. Uses at most `threads` threads; the result has the same bits on any number of them. Contiguous groups
// need no scratch memory, other groups need a few numbers each, and trajectories a map of their ids. `out` must not
// share memory with an input.
//
// Throws std::invalid_argument that names the argument, the rows and the remedy. Nothing has been written then, unless
// the error is a mask value, because masks are checked while `out` is written.
void compute_advantages(const Rollouts& rollouts, const Groups& groups, std::span<const double> prior,
                        const Options& options, const Buffer& out, const Table& table, int threads);

}  // namespace v05
