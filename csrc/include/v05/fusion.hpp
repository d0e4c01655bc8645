// Every baseline as a pure function of a group's count, mean and prior, in reward units.
// `kernels/fusion.py` is the same arithmetic for the GPU; `v05/reference.py` is the specification of both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace v05 {

// Shared by number with v05.methods.Baseline.
enum class Baseline : std::uint8_t { kGroupMean = 0, kPrior = 1, kShrinkage = 2 };

struct Fusion {
  double baseline = std::numeric_limits<double>::quiet_NaN();     // reward units
  double weight = 1.0;                                            // of the group mean
  double statistic = std::numeric_limits<double>::quiet_NaN();    // T = k d^2, d in centred units
  double squared_bias = std::numeric_limits<double>::infinity();  // D2, centred units; infinite where there is no prior
  double mse = std::numeric_limits<double>::quiet_NaN();          // reward units squared

  // chi-square with one degree of freedom; a diagnostic
  [[nodiscard]] double p_value() const { return std::erfc(std::sqrt(statistic / 2.0)); }
};

// V_0.5's empirical shrinkage (arXiv 2603.10848). half_range = (hi - lo) / 2 carries reward units to centred ones.
// A NaN prior is no prior: the mean stands. Without a rollout the prior stands.
inline Fusion shrinkage(std::int64_t count, double mean, double prior, double half_range) {
  Fusion fusion;
  const auto k = static_cast<double>(count);
  if (std::isnan(prior)) {
    fusion.baseline = mean;
    fusion.mse = count > 0 ? half_range * half_range / k : fusion.mse;
    return fusion;
  }
  if (count == 0) {
    fusion.baseline = prior;
    fusion.weight = 0.0;
    fusion.squared_bias = 0.0;
    return fusion;
  }
  const double difference = (mean - prior) / half_range;
  const double squared = difference * difference;
  fusion.statistic = k * squared;
  fusion.squared_bias = std::max(0.0, squared - 1.0 / k);
  fusion.weight = fusion.statistic > 1.0 ? 1.0 - 1.0 / fusion.statistic : 0.0;
  fusion.baseline = prior + fusion.weight * (mean - prior);
  fusion.mse = fusion.weight / k * half_range * half_range;
  return fusion;
}

// The baseline of any method. Where there is no prior the group mean stands in, where there is no rollout the prior.
inline double baseline_of(Baseline rule, std::int64_t count, double mean, double prior, double half_range) {
  if (rule == Baseline::kShrinkage) {
    return shrinkage(count, mean, prior, half_range).baseline;
  }
  const bool use_prior = rule == Baseline::kPrior ? !std::isnan(prior) : count == 0;
  return use_prior ? prior : mean;
}

}  // namespace v05
