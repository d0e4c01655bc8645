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

// Take another rollout while that gain is more than its cost.
inline bool calibrated_take_more(std::int64_t count, const CalibratedFusion& fusion, std::int64_t max_rollouts,
                                 double cost) {
  return count < max_rollouts && calibrated_gain(fusion) > cost;
}

// What a group of `count` rollouts is worth before any of them is run (V0, arXiv 2602.03584): B (1 - p) (1 - (1 - p)^(B
// - 1)).
inline double predicted_utility(std::int64_t count, double rate) {
  const auto b = static_cast<double>(count);
  return b * (1.0 - rate) * (1.0 - std::pow(1.0 - rate, b - 1.0));
}

}  // namespace v05
