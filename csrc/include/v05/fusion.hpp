// Every baseline as a pure function of a group's count, mean and prior, in reward units. Calibrated fusion takes
// rewards and priors scaled to [0, 1]. `kernels/advantage/fusion.py` has the same arithmetic for the GPU, and
// `v05/reference/` specifies both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "v05/likelihood.hpp"
#include "v05/moments.hpp"

namespace v05 {

// v05.methods.Baseline has the same numbers.
enum class Baseline : std::uint8_t {
  kGroupMean = 0,
  kPrior = 1,
  kShrinkage = 2,
  kCalibrated = 3,
  kZero = 4,
  kBatchMean = 5,
  kEnergyMean = 6,
  kJamesStein = 7,
  kLeastVariance = 8,
  kBatchEnergyMean = 9,
  kConjugate = 10,
};

// Whether the baseline is computed from a posterior of the success rate, which a Calibration defines.
inline bool is_calibrated(Baseline rule) { return rule == Baseline::kCalibrated || rule == Baseline::kLeastVariance; }

// Whether the baseline reads a prior, and so requires a range that contains priors and rewards.
inline bool needs_prior(Baseline rule) {
  return rule == Baseline::kPrior || rule == Baseline::kShrinkage || rule == Baseline::kConjugate ||
         is_calibrated(rule);
}
inline bool needs_energy(Baseline rule) { return rule == Baseline::kEnergyMean || rule == Baseline::kBatchEnergyMean; }
inline bool needs_groups(Baseline rule) { return rule == Baseline::kJamesStein; }  // other groups of the batch
inline bool needs_batch(Baseline rule) {
  return rule == Baseline::kBatchMean || rule == Baseline::kBatchEnergyMean || needs_groups(rule);
}

// By how much rewards may exceed a bound, because of rounding: 0.3 in float32 is above 0.3, and sums of rewards round.
inline double rounding_slack(double low, double high) {
  return std::numeric_limits<float>::epsilon() * std::max(std::abs(low), std::abs(high));
}

struct Fusion {
  double baseline = std::numeric_limits<double>::quiet_NaN();     // reward units
  double weight = 1.0;                                            // weight of the group mean
  double statistic = std::numeric_limits<double>::quiet_NaN();    // T = k d^2, d in centred units
  double squared_bias = std::numeric_limits<double>::infinity();  // D2, centred units; infinite without a prior
  double mse = std::numeric_limits<double>::quiet_NaN();          // reward units squared
};

// V_0.5's empirical shrinkage (arXiv 2603.10848). half_range = (hi - lo) / 2 converts reward units to centred units.
// Without a prior (NaN) the baseline is the mean, without a rollout it is the prior.
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

// Statistics from which a baseline is computed, reward units: those of a group or, with left_out, those without one of
// its rollouts.
struct Known {
  std::int64_t count = 0;  // rollouts
  double mean = std::numeric_limits<double>::quiet_NaN();
  double energy_mean = std::numeric_limits<double>::quiet_NaN();  // NaN: no energies, or all 0
  double prior = std::numeric_limits<double>::quiet_NaN();        // NaN if there is none
  double kappa = 0.0;                                             // the number of rollouts that the prior is worth
  std::int64_t batch_count = 0;                                   // this and the next two describe the batch
  double batch_mean = std::numeric_limits<double>::quiet_NaN();
  double batch_energy_mean = std::numeric_limits<double>::quiet_NaN();  // NaN: no energies, or all 0
  double other_groups = std::numeric_limits<double>::quiet_NaN();       // mean of the other groups' means
  const BatchMoments* batch = nullptr;                                  // null unless needs_batch(rule)
  bool left_out = false;                                                // whether a rollout is left out
};

// Shrinks the mean towards the mean of the other groups' means (James-Stein, arXiv 2511.03710). The weight of the other
// groups is the share of the differences among groups that chance explains. The baseline of a group of one rollout is
// the mean of the others, also if that rollout is left out. Without other groups it is the group's mean, and without a
// rollout either it is the prior.
inline double james_stein(std::int64_t count, double mean, double prior, double other_groups, bool left_out,
                          const GroupsOfBatch& groups) {
  if (std::isnan(other_groups)) {
    return count == 0 ? prior : mean;
  }
  if (count < (left_out ? 1 : 2)) {
    return other_groups;
  }
  const double noise = left_out ? groups.noise_of_others.mean : groups.noise.mean;
  const double spread = std::max(0.0, groups.means.variance() - groups.noise.mean);
  const double weight = noise > 0.0 ? noise / (noise + spread) : 0.0;
  return mean + weight * (other_groups - mean);
}

// Fuses the mean with a prior that is worth kappa rollouts: the posterior mean of a Beta prior (EBPO, arXiv
// 2602.05165). Without a prior (NaN) the result is the mean, without a rollout it is the prior.
inline double conjugate(std::int64_t count, double mean, double prior, double kappa) {
  if (std::isnan(prior)) {
    return mean;
  }
  return count == 0 ? prior
                    : prior + static_cast<double>(count) / (static_cast<double>(count) + kappa) * (mean - prior);
}

// The baseline of any method except those with a calibrated prior. Without a prior it is the group mean, without a
// rollout the prior, and without energies the unweighted mean.
inline double baseline_of(Baseline rule, const Known& known, double half_range) {
  switch (rule) {
    case Baseline::kShrinkage:
      return shrinkage(known.count, known.mean, known.prior, half_range).baseline;
    case Baseline::kPrior:
      return std::isnan(known.prior) ? known.mean : known.prior;
    case Baseline::kConjugate:
      return conjugate(known.count, known.mean, known.prior, known.kappa);
    case Baseline::kZero:
      return 0.0;
    case Baseline::kBatchMean:
      return known.batch_mean;
    case Baseline::kJamesStein:
      return james_stein(known.count, known.mean, known.prior, known.other_groups, known.left_out, known.batch->groups);
    case Baseline::kBatchEnergyMean:
      return std::isnan(known.batch_energy_mean) ? known.batch_mean : known.batch_energy_mean;
    case Baseline::kEnergyMean:
      if (!std::isnan(known.energy_mean)) {
        return known.energy_mean;
      }
      [[fallthrough]];
    default:
      return known.count == 0 ? known.prior : known.mean;
  }
}

// Whether a rollout has no baseline but its own reward.
inline bool is_alone(Baseline rule, const Known& known) {
  switch (rule) {
    case Baseline::kZero:
    case Baseline::kCalibrated:  // there is always the vague prior
    case Baseline::kLeastVariance:
      return false;
    case Baseline::kBatchMean:
    case Baseline::kBatchEnergyMean:
      return known.batch_count == 1;
    case Baseline::kJamesStein:
      return known.count == 1 && std::isnan(known.other_groups);
    case Baseline::kPrior:
    case Baseline::kShrinkage:
    case Baseline::kConjugate:
      return known.count == 1 && std::isnan(known.prior);
    default:
      return known.count == 1;
  }
}

// The four numbers of calibrated fusion, and the two of the energies. A prior v is read as Beta(kappa q, kappa (1 - q))
// with q = sigmoid(alpha + beta logit v), and with probability eps as hallucinated, that is, uninformative. At success
// rate p the log-ratio of the mean energies of successes and failures is delta0 + delta1 log(1 - p).
struct Calibration {
  double alpha = 0.0;
  double beta = 1.0;
  double kappa = 4.5;
  double eps = 0.12;
  double delta0 = 0.0;
  double delta1 = 0.0;

  [[nodiscard]] bool knows_energies() const { return delta0 != 0.0 || delta1 != 0.0; }

  // Within these bounds nothing below overflows or divides by zero. v05.methods.Calibration has the same bounds.
  [[nodiscard]] bool within_bounds() const {
    return std::abs(alpha) <= 100.0 && std::abs(beta) <= 100.0 && kappa >= 1e-6 && kappa <= 1e12 && eps > 0.0 &&
           eps < 1.0 && std::abs(delta0) <= 8.0 && std::abs(delta1) <= 8.0;
  }
};

// How a prior is read: a distribution of the success rate, and the odds that the prior is not hallucinated. The default
// is that of no prior, with odds of 0 against the vague distribution.
struct Belief {
  Beta rate = kVague;
  double odds = 0.0;
};

// The belief from a prior in [0, 1]; NaN means no prior.
inline Belief believe(double prior, const Calibration& calibration) {
  constexpr double kLeastPrior = 0.005;
  if (std::isnan(prior)) {
    return {};
  }
  const double v = std::clamp(prior, kLeastPrior, 1.0 - kLeastPrior);
  const double success = std::exp(calibration.alpha + calibration.beta * std::log(v / (1.0 - v)));  // odds of a success
  return {
      .rate = {.a = calibration.kappa * (success / (1.0 + success)), .b = calibration.kappa / (1.0 + success)},
      .odds = std::min((1.0 - calibration.eps) / calibration.eps, std::numeric_limits<double>::max()),
  };
}

struct CalibratedFusion {
  double baseline = 0.5;       // posterior mean of the success rate, rewards scaled to [0, 1]
  double complement = 0.5;     // 1 - baseline, computed without cancellation
  double variance = 0.0;       // of the success rate
  double hallucination = 1.0;  // probability that the prior is uninformative here
};

// Calibrated fusion of `count` rewards, scaled to [0, 1], with a belief. `successes` is the sum of the rewards and
// `ratio` their likelihood ratio.
inline CalibratedFusion calibrated(std::int64_t count, double successes, const Belief& belief, double ratio) {
  const double failures = static_cast<double>(count) - successes;
  const Beta vague = kVague.after(successes, failures);
  const Beta informed = belief.rate.after(successes, failures);
  const double odds = std::min(belief.odds * ratio, std::numeric_limits<double>::max());
  const double w0 = 1.0 / (1.0 + odds);
  const double w1 = odds / (1.0 + odds);
  const double difference = informed.mean() - vague.mean();
  return {
      .baseline = w1 * informed.mean() + w0 * vague.mean(),
      .complement = w1 * informed.complement() + w0 * vague.complement(),
      .variance = w1 * informed.variance() + w0 * vague.variance() + w0 * w1 * difference * difference,
      .hallucination = w0,
  };
}

// The mean energy of successes over that of failures at the failure rate `complement`.
inline double energy_ratio(double complement, const Calibration& calibration) {
  constexpr double kMost = 8.0;
  const double shift = calibration.delta0 + calibration.delta1 * std::log(complement);
  return std::exp(std::clamp(shift, -kMost, kMost));
}

// The baseline that minimises E[(reward - baseline)^2 energy], for rewards scaled to [0, 1]: E[reward energy] /
// E[energy].
inline double least_variance(const CalibratedFusion& fusion, const Calibration& calibration) {
  const double success = fusion.baseline * energy_ratio(fusion.complement, calibration);
  return success / (success + fusion.complement);
}

inline CalibratedFusion calibrated(std::int64_t count, double successes, const Belief& belief) {
  const double failures = static_cast<double>(count) - successes;
  return calibrated(count, successes, belief, likelihood_ratio(belief.rate, successes, failures));
}

}  // namespace v05
