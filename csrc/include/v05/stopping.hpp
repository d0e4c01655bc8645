// When to stop buying rollouts for a group: pure functions of its statistics.
#pragma once

#include <cmath>
#include <cstdint>

namespace v05 {

// One-step look-ahead (arXiv 2603.10848): take another rollout while the estimated error D2 / (k D2 + 1) would fall by
// more than its cost. Centred units. Without a prior D2 is infinite and the fall is 1 / (k (k + 1)).
inline bool osla_take_more(std::int64_t count, double squared_bias, std::int64_t max_rollouts, double cost) {
  if (count >= max_rollouts) {
    return false;
  }
  const auto k = static_cast<double>(count);
  if (std::isinf(squared_bias)) {
    return count == 0 || 1.0 / (k * (k + 1.0)) > cost;
  }
  return squared_bias / (k * squared_bias + 1.0) - squared_bias / ((k + 1.0) * squared_bias + 1.0) > cost;
}

}  // namespace v05
