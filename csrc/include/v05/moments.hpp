// Moments of the rewards of a group and of the batch. No Python, no tensors.
#pragma once

#include <algorithm>
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

// Collects rewards one by one. All-zero bytes are an empty accumulator. Sums run over the deviations from the first
// reward, so that rewards near 1e4 with a spread of 1e-3 keep their digits, which sum(x^2) - n mean^2 would lose. The
// loss by cancellation is at most a factor of the number of rewards (Chan, Golub & LeVeque 1983).
class MomentsAccumulator {
 public:
  void add(double reward) {
    first_ = count_ == 0 ? reward : first_;
    const double deviation = reward - first_;
    sum_ += deviation;
    sum_squares_ += deviation * deviation;
    differs_ |= static_cast<std::uint32_t>(deviation != 0.0);
    ++count_;
  }

  [[nodiscard]] Moments moments() const {
    if (count_ == 0) {
      return {};
    }
    const auto count = static_cast<double>(count_);
    const double m2 = sum_squares_ - sum_ * (sum_ / count);
    return {
        .count = count_,
        .mean = differs_ == 0 ? first_ : (count * first_ + sum_) / count,  // exact for sums of 0 and 1
        .m2 = std::isnan(m2) ? std::numeric_limits<double>::infinity() : std::max(0.0, m2),  // NaN: overflow
        .all_equal = differs_ == 0,
    };
  }

 private:
  double first_ = 0.0;
  double sum_ = 0.0;
  double sum_squares_ = 0.0;
  std::int32_t count_ = 0;
  std::uint32_t differs_ = 0;
};

inline Moments moments(std::span<const double> rewards) {
  MomentsAccumulator collected;
  for (const double reward : rewards) {
    collected.add(reward);
  }
  return collected.moments();
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

// Sums for an energy-weighted mean of rewards. All-zero bytes are empty sums. Rewards are added as deviations from the
// first, as in MomentsAccumulator, so that the mean of equal rewards is exactly that reward.
struct WeightedSums {
  double origin = 0.0;     // the first reward with a weight above 0
  double weight = 0.0;     // sum of the weights
  double deviation = 0.0;  // sum of weight * (reward - origin)

  void add(double reward, double of_weight) {
    if (of_weight > 0.0) {
      origin = weight == 0.0 ? reward : origin;
      weight += of_weight;
      deviation += of_weight * (reward - origin);
    }
  }

  // NaN if no weight is above 0.
  [[nodiscard]] double mean() const { return origin + deviation / weight; }

  // The mean without this reward; NaN if the other rewards have no weight.
  [[nodiscard]] double mean_without(double reward, double of_weight) const {
    const double left = weight - of_weight;
    return left > 0.0 ? origin + (deviation - of_weight * (reward - origin)) / left
                      : std::numeric_limits<double>::quiet_NaN();
  }
};

inline WeightedSums merge(const WeightedSums& a, const WeightedSums& b) {
  if (a.weight == 0.0 || b.weight == 0.0) {
    return a.weight == 0.0 ? b : a;
  }
  return {
      .origin = a.origin,
      .weight = a.weight + b.weight,
      .deviation = a.deviation + b.deviation + b.weight * (b.origin - a.origin),
  };
}

// Statistics of a batch's groups that some baselines read.
struct GroupsOfBatch {
  Moments means;  // moments of the means of all groups with rollouts
  // Variance of a group's mean by chance, averaged over the groups of two or more rollouts: var / k, or var / (k - 1)
  // with one rollout left out.
  Moments noise;
  Moments noise_of_others;
};

// Statistics of the whole batch that some baselines and scales read.
struct BatchMoments {
  Moments rewards;        // moments of all rollouts that count
  WeightedSums weighted;  // their sums weighted by energy; empty without energies
  GroupsOfBatch groups;   // empty unless the baseline reads them
};

// The statistics of a single group, to be merged.
inline GroupsOfBatch groups_of(const Moments& group) {
  const auto one_if = [](bool known, double value) { return known ? Moments{.count = 1, .mean = value} : Moments{}; };
  const auto count = static_cast<double>(group.count);
  return {
      .means = one_if(group.count > 0, group.mean),
      .noise = one_if(group.count > 1, group.variance() / count),
      .noise_of_others = one_if(group.count > 1, group.variance() / (count - 1.0)),
  };
}

inline GroupsOfBatch merge(const GroupsOfBatch& a, const GroupsOfBatch& b) {
  return {
      .means = merge(a.means, b.means),
      .noise = merge(a.noise, b.noise),
      .noise_of_others = merge(a.noise_of_others, b.noise_of_others),
  };
}

}  // namespace v05
