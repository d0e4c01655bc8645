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

// The four numbers of calibrated fusion. A prior v is read as Beta(kappa q, kappa (1 - q)) with q = sigmoid(alpha +
// beta logit v), and with probability eps as hallucinated: then it says nothing.
struct Calibration {
  double alpha = 0.0;
  double beta = 1.0;
  double kappa = 1.0;
  double eps = 0.5;

  // Within these bounds (those of v05.methods.Calibration) nothing below overflows or divides by zero.
  [[nodiscard]] bool within_bounds() const {
    return std::abs(alpha) <= 100.0 && std::abs(beta) <= 100.0 && kappa >= 1e-6 && kappa <= 1e12 && eps > 0.0 &&
           eps < 1.0;
  }
};

struct Beta {
  double a = 0.5;
  double b = 0.5;

  [[nodiscard]] double mean() const { return a / (a + b); }
  [[nodiscard]] double complement() const { return b / (a + b); }  // 1 - mean, with all its digits
  [[nodiscard]] double variance() const { return mean() * complement() / (a + b + 1.0); }
};

// log Gamma(a + x) - log Gamma(a) for a > 0, x >= 0. Differences of lgamma lose their digits where a is large: here a
// is raised to where Stirling's series is exact to rounding, and its leading terms are subtracted on paper.
inline double log_rising(double a, double x) {
  constexpr double kStirling = 16.0;
  double raised = 1.0;
  while (a < kStirling) {
    raised *= a / (a + x);
    a += 1.0;
  }
  const auto series = [](double z) {
    const double z2 = z * z;
    return (1.0 - (1.0 - (2.0 / 7.0 - 3.0 / (14.0 * z2)) / z2) / (30.0 * z2)) / (12.0 * z);
  };
  return std::log(raised) + (a - 0.5) * std::log1p(x / a) + x * (std::log(a + x) - 1.0) + series(a + x) - series(a);
}

// Log probability of a sequence with these successes and failures, its rate drawn from `prior`.
inline double log_evidence(const Beta& prior, double successes, double failures) {
  return log_rising(prior.a, successes) + log_rising(prior.b, failures) -
         log_rising(prior.a + prior.b, successes + failures);
}

struct CalibratedFusion {
  double baseline = 0.5;       // mean of the success rate, rewards scaled to [0, 1]
  double complement = 0.5;     // 1 - baseline, with all its digits
  double variance = 0.0;       // of the success rate
  double hallucination = 1.0;  // probability that the prior says nothing here
};

// Calibrated fusion of `count` rewards, each scaled to [0, 1] and `successes` their sum, with a prior in [0, 1].
// A NaN prior is no prior: the vague component alone.
inline CalibratedFusion calibrated(std::int64_t count, double successes, double prior, const Calibration& calibration) {
  constexpr Beta kVague{.a = 0.5, .b = 0.5};
  constexpr double kLeastPrior = 0.005;
  const double failures = static_cast<double>(count) - successes;
  const Beta vague{.a = kVague.a + successes, .b = kVague.b + failures};
  if (std::isnan(prior)) {
    return {
        .baseline = vague.mean(),
        .complement = vague.complement(),
        .variance = vague.variance(),
    };
  }
  const double v = std::clamp(prior, kLeastPrior, 1.0 - kLeastPrior);
  const double logit = calibration.alpha + calibration.beta * std::log(v / (1.0 - v));
  const Beta believed{
      .a = calibration.kappa / (1.0 + std::exp(-logit)),
      .b = calibration.kappa / (1.0 + std::exp(logit)),
  };
  const double log_odds = std::log1p(-calibration.eps) - std::log(calibration.eps) +
                          log_evidence(believed, successes, failures) - log_evidence(kVague, successes, failures);
  const double w0 = 1.0 / (1.0 + std::exp(log_odds));
  const double w1 = 1.0 / (1.0 + std::exp(-log_odds));
  const Beta informed{.a = believed.a + successes, .b = believed.b + failures};
  const double difference = informed.mean() - vague.mean();
  return {
      .baseline = w1 * informed.mean() + w0 * vague.mean(),
      .complement = w1 * informed.complement() + w0 * vague.complement(),
      .variance = w1 * informed.variance() + w0 * vague.variance() + w0 * w1 * difference * difference,
      .hallucination = w0,
  };
}

}  // namespace v05
