// Budget rules, which decide when a group has enough rollouts, as pure functions of its statistics.
#pragma once

#include <cmath>
#include <cstdint>

#include "v05/fusion.hpp"

namespace v05 {

// One-step look-ahead (arXiv 2603.10848): the decrease of the estimated error D2 / (k D2 + 1) with one more rollout,
// centred units. Without a prior D2 is infinite and the decrease is 1 / (k (k + 1)).
inline double osla_gain(std::int64_t count, double squared_bias) {
  const auto k = static_cast<double>(count);
  if (std::isinf(squared_bias)) {
    return 1.0 / (k * (k + 1.0));
  }
  return squared_bias / (k * squared_bias + 1.0) - squared_bias / ((k + 1.0) * squared_bias + 1.0);
}

// Take another rollout while that gain is more than its cost.
inline bool osla_take_more(std::int64_t count, double squared_bias, std::int64_t max_rollouts, double cost) {
  return count < max_rollouts && osla_gain(count, squared_bias) > cost;
}

// The expected decrease of the variance of the success rate p with one more rollout, centred units (hence the 4). It is
// the variance of the next mean (law of total variance). With mean m and variance s2 of p, the next mean is m + s2 / m
// after a success, which has probability m, and m - s2 / (1 - m) after a failure.
inline double calibrated_gain(const CalibratedFusion& fusion) {
  return 4.0 * fusion.variance * (fusion.variance / (fusion.baseline * fusion.complement));
}

// The gain of `calibrated_gain` after `further` other rollouts, which are assumed to leave the mean m unchanged. If p
// has a Beta distribution, its variance is then s2 / (1 + further s2 / (m (1 - m))).
inline double calibrated_gain(const CalibratedFusion& fusion, std::int64_t further) {
  const double shrinks_by =
      1.0 + static_cast<double>(further) * (fusion.variance / (fusion.baseline * fusion.complement));
  return calibrated_gain(fusion) / (shrinks_by * shrinks_by);
}

// Take another rollout while that gain is more than its cost.
inline bool calibrated_take_more(std::int64_t count, const CalibratedFusion& fusion, std::int64_t max_rollouts,
                                 double cost) {
  return count < max_rollouts && calibrated_gain(fusion) > cost;
}

// The expected variance of one rollout's gradient under the least-variance baseline, in centred units (hence the 4) and
// with w0 = 1. It is the mean of p (1 - p) w1 w0 / (p w1 + (1 - p) w0) over the success rate p, where w1 and w0 are the
// mean energies of successes and failures. E[p (1 - p)] is exact. In the other factor, p and w1 are taken at one rate:
// the mean of p weighted by p (1 - p), for a Beta with the mean and the variance of p.
inline double gradient_variance(const CalibratedFusion& fusion, const Calibration& calibration) {
  const double product = fusion.baseline * fusion.complement;
  const double spread = product - fusion.variance;
  const double success = (fusion.baseline * spread + fusion.variance) / (product + fusion.variance);
  const double failure = (fusion.complement * spread + fusion.variance) / (product + fusion.variance);
  const double ratio = energy_ratio(failure, calibration);
  return 4.0 * spread * (ratio / (success * ratio + failure));
}

// The decrease of the variance of the mean of a group's gradients with one more rollout. `variance` is that of one
// rollout's gradient. Infinite without a rollout.
inline double variance_gain(std::int64_t count, double variance) {
  const auto k = static_cast<double>(count);
  return variance / (k * (k + 1.0));
}

// The gain from the first rollout of a new prompt, whose success rate has the vague prior. Another rollout of a known
// prompt competes with it.
inline double fresh_prompt_gain(const Calibration& calibration) {
  return gradient_variance(calibrated(0, 0.0, {}), calibration);
}

// Take another rollout while that gain is more than its cost.
inline bool variance_take_more(std::int64_t count, const CalibratedFusion& fusion, const Calibration& calibration,
                               std::int64_t max_rollouts, double cost) {
  return count < max_rollouts && variance_gain(count, gradient_variance(fusion, calibration)) > cost;
}

// The utility of a group of B = `count` rollouts at the predicted success rate p (V0, arXiv 2602.03584):
// B (1 - p) (1 - (1 - p)^(B - 1)).
inline double predicted_utility(std::int64_t count, double rate) {
  const auto b = static_cast<double>(count);
  return b * (1.0 - rate) * (1.0 - std::pow(1.0 - rate, b - 1.0));
}

}  // namespace v05
