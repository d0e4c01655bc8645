// Judges compute the advantages of a group's rollouts from the moments of the group. Everything here is inline, because
// it runs once per group or once per row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "v05/advantage.hpp"
#include "v05/stopping.hpp"

namespace v05 {

// The sums over a group's rollouts. All-zero bytes are the sums over no rollout. Energies are summed only for baselines
// that read them.
template <bool kEnergy>
struct GroupSums {
  MomentsAccumulator rewards;

  void add(double reward, double /*energy*/) { rewards.add(reward); }
  [[nodiscard]] static WeightedSums weighted() { return {}; }
};

template <>
struct GroupSums<true> {
  MomentsAccumulator rewards;
  WeightedSums by_energy;

  void add(double reward, double energy) {
    rewards.add(reward);
    by_energy.add(reward, energy);
  }
  [[nodiscard]] const WeightedSums& weighted() const { return by_energy; }
};

// Everything from which a baseline is computed, except the options.
struct Evidence {
  Moments moments;        // of the group
  WeightedSums weighted;  // weighted by energy
  double prior;           // reward units; NaN if there is none
  const BatchMoments& batch;
};

// The mean without this reward; NaN if there is no other.
inline double mean_without(double reward, std::int64_t count, double mean) {
  return count > 1 ? mean + (mean - reward) / static_cast<double>(count - 1) : std::numeric_limits<double>::quiet_NaN();
}

// The mean of the means of the other groups; NaN if there is no other. This group may have no rollout.
inline double mean_without_group(const Moments& means, const Moments& group) {
  return group.count > 0 ? mean_without(group.mean, means.count, means.mean) : means.mean;
}

// A group and its baseline, for any method except those with a calibrated prior.
template <bool kReadsEnergy, bool kReadsBatch>
struct Group {
  static constexpr bool kEnergy = kReadsEnergy;
  static constexpr bool kBatch = kReadsBatch;
  Moments moments;
  Known known;

  Group(const Evidence& evidence, const Options& options, bool /*wants_baseline*/)
      : moments(evidence.moments),
        known{.count = moments.count,
              .mean = moments.mean,
              .energy_mean = evidence.weighted.mean(),
              .prior = evidence.prior,
              .kappa = options.calibration.kappa} {
    if constexpr (kReadsBatch) {
      known.batch_count = evidence.batch.rewards.count;
      known.batch_mean = evidence.batch.rewards.mean;
      known.batch_energy_mean = evidence.batch.weighted.mean();
      known.batch = &evidence.batch;
      if (needs_groups(options.baseline)) {
        known.other_groups = mean_without_group(evidence.batch.groups.means, evidence.moments);
      }
    }
  }

  [[nodiscard]] double baseline(const Options& options) const {
    return baseline_of(options.baseline, known, options.half_range());
  }
  [[nodiscard]] bool is_alone(const Options& options) const { return v05::is_alone(options.baseline, known); }
};

// The sum of a group's rewards scaled to [0, 1]. Rounding errors around whole numbers are removed, because under a
// certain prior 1e-16 of a success differs much from none.
inline double successes_of(const Moments& group, const Options& options) {
  const auto count = static_cast<double>(group.count);
  const double sum = group.count == 0 ? 0.0 : std::clamp(count * options.scaled(group.mean), 0.0, count);
  const double whole = std::floor(sum + 0.5);
  return std::abs(sum - whole) <= count * options.scaled_rounding() ? whole : sum;
}

// The baseline of a calibrated method, in reward units.
inline double baseline_of(const CalibratedFusion& fusion, const Options& options) {
  const bool shifted = options.baseline == Baseline::kLeastVariance;
  return options.unscaled(shifted ? least_variance(fusion, options.calibration) : fusion.baseline);
}

// A group and its calibrated fusion.
struct CalibratedGroup {
  static constexpr bool kEnergy = false;
  static constexpr bool kBatch = false;
  Moments moments;
  double successes;         // sum of the rewards scaled to [0, 1]
  Belief belief;            // distribution that the prior is read as
  CalibratedFusion fusion;  // computed only if the baseline is wanted

  CalibratedGroup(const Evidence& evidence, const Options& options, bool wants_baseline)
      : moments(evidence.moments),
        successes(successes_of(moments, options)),
        belief(believe(options.scaled(evidence.prior), options.calibration)),
        fusion(wants_baseline ? calibrated(moments.count, successes, belief) : CalibratedFusion{}) {}

  [[nodiscard]] double baseline(const Options& options) const { return baseline_of(fusion, options); }
  [[nodiscard]] static bool is_alone(const Options& /*options*/) { return false; }  // there is always the vague prior
};

// Rewards that are all equal are not scaled, because dividing by eps would blow them up. A mean of 0 scales nothing
// either.
inline double divisor_of(const Moments& population, const Options& options) {
  if (options.scale == Scale::kMean) {
    return population.mean > 0.0 ? population.mean : 1.0;
  }
  const bool unscaled = options.scale == Scale::kNone || population.all_equal;
  return unscaled ? 1.0 : std::sqrt(population.variance()) + options.eps;
}

// Advantages from one baseline for the whole group.
template <class GroupKind>
class Judge {
 public:
  using Kind = GroupKind;

  Judge(const GroupKind& group, const Evidence& /*evidence*/, const Options& options, double divisor)
      : baseline_(group.baseline(options)), divisor_(divisor) {
    if (options.raw_singleton && group.is_alone(options)) {  // otherwise the advantage is 0
      baseline_ = 0.0;
      divisor_ = 1.0;
    } else if (GroupKind::kBatch && std::isnan(baseline_)) {  // no other rollouts: advantage 0
      baseline_ = 0.0;
      divisor_ = std::numeric_limits<double>::infinity();
    }
  }

  double operator()(double reward, double /*energy*/, const Options& /*options*/) const {
    return (reward - baseline_) / divisor_;
  }

 private:
  double baseline_;
  double divisor_;
};

// Advantages from a baseline of the group's other rollouts.
class LeaveOneOutJudge {
 public:
  using Kind = Group<false, false>;

  LeaveOneOutJudge(const Kind& group, const Evidence& evidence, const Options& options, double divisor)
      : mean_(group.moments.mean),
        prior_(evidence.prior),
        divisor_(divisor),
        others_(group.is_alone(options) ? kAlone : group.moments.count - 1) {}

  double operator()(double reward, double /*energy*/, const Options& options) const {
    if (others_ == kAlone) {
      return options.raw_singleton ? reward : 0.0;
    }
    const Known others{.count = others_,
                       .mean = mean_ + (mean_ - reward) / static_cast<double>(others_),
                       .prior = prior_,
                       .kappa = options.calibration.kappa,
                       .left_out = true};
    return (reward - baseline_of(options.baseline, others, options.half_range())) / divisor_;
  }

 private:
  static constexpr std::int64_t kAlone = -1;
  double mean_;
  double prior_;
  double divisor_;
  std::int64_t others_;
};

// Advantages from a baseline of the group's other rollouts weighted by energy, or of all other rollouts of the batch.
template <bool kReadsEnergy, bool kReadsBatch>
class WeighedLeaveOneOutJudge {
 public:
  using Kind = Group<kReadsEnergy, kReadsBatch>;

  WeighedLeaveOneOutJudge(const Kind& group, const Evidence& evidence, const Options& options, double divisor)
      : known_(group.known), weighted_(evidence.weighted), divisor_(divisor), alone_(group.is_alone(options)) {}

  double operator()(double reward, double energy, const Options& options) const {
    if (alone_) {
      return options.raw_singleton ? reward : 0.0;
    }
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    Known others{
        .count = known_.count - 1,
        .mean = mean_without(reward, known_.count, known_.mean),
        .energy_mean = kReadsEnergy ? weighted_.mean_without(reward, energy) : kNone,
        .prior = known_.prior,
        .left_out = true,
    };
    if constexpr (kReadsBatch) {
      others.batch_count = known_.batch_count - 1;
      others.batch_mean = mean_without(reward, known_.batch_count, known_.batch_mean);
      others.batch_energy_mean = kReadsEnergy ? known_.batch->weighted.mean_without(reward, energy) : kNone;
      others.other_groups = known_.other_groups;
      others.batch = known_.batch;
    }
    return (reward - baseline_of(options.baseline, others, options.half_range())) / divisor_;
  }

 private:
  Known known_;
  WeightedSums weighted_;
  double divisor_;
  bool alone_;
};

// Advantages from the calibrated fusion of the group's other rollouts. If all rewards are the lowest or the highest,
// there are only two advantages, which are stored. Otherwise the common part of the group's likelihood ratios is
// stored.
class CalibratedLeaveOneOutJudge {
 public:
  using Kind = CalibratedGroup;

  CalibratedLeaveOneOutJudge(const CalibratedGroup& group, const Evidence& /*evidence*/, const Options& options,
                             double divisor)
      : belief_(group.belief),
        successes_(group.successes),
        others_(std::max<std::int64_t>(group.moments.count - 1, 0)),  // 0 for an empty group
        divisor_(divisor),
        is_binary_(is_binary(group.moments, options)) {
    if (!is_binary_ || static_cast<double>(others_) > kFew) {
      ratio_.emplace(belief_.rate, static_cast<double>(others_));
    }
    if (is_binary_) {
      of_lowest_ = compute(options.low, options);
      of_highest_ = compute(options.high, options);
    }
  }

  double operator()(double reward, double /*energy*/, const Options& options) const {
    if (is_binary_ && (reward == options.low || reward == options.high)) {
      return reward == options.low ? of_lowest_ : of_highest_;
    }
    return compute(reward, options);
  }

 private:
  // A sample in a range has the largest variance if all its values are ends of the range. A wrong answer by rounding
  // only costs time.
  static bool is_binary(const Moments& m, const Options& options) {
    constexpr double kRounding = 1e-9;
    return m.m2 >= (1.0 - kRounding) * static_cast<double>(m.count) * (m.mean - options.low) * (options.high - m.mean);
  }

  [[nodiscard]] double compute(double reward, const Options& options) const {
    const auto others = static_cast<double>(others_);
    const double successes = std::clamp(successes_ - options.scaled(reward), 0.0, others);
    const double ratio = ratio_ ? (*ratio_)(successes) : likelihood_ratio(belief_.rate, successes, others - successes);
    const CalibratedFusion fusion = calibrated(others_, successes, belief_, ratio);
    return (reward - baseline_of(fusion, options)) / divisor_;
  }

  Belief belief_;
  double successes_;
  std::int64_t others_;
  double divisor_;
  bool is_binary_;
  double of_lowest_ = 0.0;
  double of_highest_ = 0.0;
  std::optional<LikelihoodRatio> ratio_;  // empty if likelihood_ratio is used instead
};

}  // namespace v05
