// When to stop buying rollouts for a group: pure functions of its statistics.
#pragma once

#include <cmath>
#include <cstdint>

#include "v05/fusion.hpp"

namespace v05 {

// One-step look-ahead (arXiv 2603.10848): by how much the estimated error D2 / (k D2 + 1) falls with one more rollout.
// Centred units. Without a prior D2 is infinite and the fall is 1 / (k (k + 1)).
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

// By how much one more rollout is expected to shrink the variance of the success rate p, centred units (hence the 4).
// The expected fall is the variance of the next mean (law of total variance). With mean m and variance s2 of p, the
// next mean is m + s2 / m after a success, which has probability m, and m - s2 / (1 - m) after a failure.
inline double calibrated_gain(const CalibratedFusion& fusion) {
  return 4.0 * fusion.variance * (fusion.variance / (fusion.baseline * fusion.complement));
}

// The same after `further` more rollouts that leave the mean m where it is, with p as of a Beta: its variance is then
// s2 / (1 + further s2 / (m (1 - m))).
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

// The variance of one rollout's gradient under the baseline of least variance, as it is expected to be: E[p (1 - p) w1
// w0 / (p w1 + (1 - p) w0)] over the success rate p, with w1 and w0 the mean energies of successes and of failures.
// Centred units (hence the 4), w0 = 1. E[p (1 - p)] is exact; p and w1 in the other factor are taken at the mean that
// p has under the weights p (1 - p), as of a Beta with the mean and the variance of p.
inline double gradient_variance(const CalibratedFusion& fusion, const Calibration& calibration) {
  const double product = fusion.baseline * fusion.complement;
  const double spread = product - fusion.variance;
  const double success = (fusion.baseline * spread + fusion.variance) / (product + fusion.variance);
  const double failure = (fusion.complement * spread + fusion.variance) / (product + fusion.variance);
  const double ratio = energy_ratio(failure, calibration);
  return 4.0 * spread * (ratio / (success * ratio + failure));
}

// By how much one more rollout lowers the variance of the mean of a group's gradients, `variance` being that of one
// rollout's; infinite without a rollout.
inline double variance_gain(std::int64_t count, double variance) {
  const auto k = static_cast<double>(count);
  return variance / (k * (k + 1.0));
}

// The variance that one rollout of a fresh prompt brings down, where nothing is known of its success rate: what another
// rollout of an old prompt has to compete with.
inline double fresh_prompt_gain(const Calibration& calibration) {
  return gradient_variance(calibrated(0, 0.0, {}), calibration);
}

// Take another rollout while that gain is more than its cost.
inline bool variance_take_more(std::int64_t count, const CalibratedFusion& fusion, const Calibration& calibration,
                               std::int64_t max_rollouts, double cost) {
  return count < max_rollouts && variance_gain(count, gradient_variance(fusion, calibration)) > cost;
}

// What a group of `count` rollouts is worth before any of them is run (V0, arXiv 2602.03584): B (1 - p) (1 - (1 - p)^(B
// - 1)).
inline double predicted_utility(std::int64_t count, double rate) {
  const auto b = static_cast<double>(count);
  return b * (1.0 - rate) * (1.0 - std::pow(1.0 - rate, b - 1.0));
}

}  // namespace v05
