// One group's reward statistics. No Python, no tensors: a range of doubles in, moments out.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

namespace v05 {

// Moments of the rewards of one group, reward units. Without a reward the mean is NaN; with fewer than two the variance
// is 0.
struct Moments {
  std::int64_t count = 0;
  double mean = std::numeric_limits<double>::quiet_NaN();
  double m2 = 0.0;  // sum of squared deviations from the mean
  bool all_equal = true;

  [[nodiscard]] double variance() const { return count > 1 ? m2 / static_cast<double>(count - 1) : 0.0; }
};

// Two passes: rewards near 1e4 with a spread of 1e-3 keep their digits, which sum(x^2) - n mean^2 would lose.
inline Moments moments(std::span<const double> rewards) {
  Moments result;
  if (rewards.empty()) {
    return result;
  }
  const auto count = static_cast<double>(rewards.size());
  double sum = 0.0;
  for (const double reward : rewards) {
    sum += reward;
    result.all_equal &= reward == rewards.front();
  }
  result.count = static_cast<std::int64_t>(rewards.size());
  result.mean = result.all_equal ? rewards.front() : sum / count;
  for (const double reward : rewards) {
    const double deviation = reward - result.mean;
    result.m2 += deviation * deviation;
  }
  return result;
}

// Pools two disjoint samples (Chan, Golub & LeVeque 1979).
inline Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0 || b.count == 0) {
    return a.count == 0 ? b : a;
  }
  const auto na = static_cast<double>(a.count);
  const auto nb = static_cast<double>(b.count);
  const double difference = b.mean - a.mean;
  return {
      .count = a.count + b.count,
      .mean = a.mean + difference * nb / (na + nb),
      .m2 = a.m2 + b.m2 + difference * difference * na * nb / (na + nb),
      .all_equal = a.all_equal && b.all_equal && a.mean == b.mean,
  };
}

}  // namespace v05
