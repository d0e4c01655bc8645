#include "v05/advantage.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "v05/group_ids.hpp"
#include "v05/grouping.hpp"
#include "v05/multiversion.hpp"
#include "v05/offenders.hpp"
#include "v05/pages.hpp"
#include "v05/parallel.hpp"
#include "v05/stopping.hpp"

namespace v05 {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

std::string range_text(const AdvantageRule& rule) {
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::digits10);
  text << "reward_range=(" << rule.low << ", " << rule.high << ')';
  return text.str();
}

void check_prior(std::span<const double> prior, const AdvantageRule& rule) {
  Offenders outside;
  const double slack = rule.rounding_slack();
  for (std::size_t g = 0; g < prior.size(); ++g) {
    if (prior[g] < rule.low - slack || prior[g] > rule.high + slack) {  // NaN is neither: no prior
      outside.add(g, prior[g]);
    }
  }
  outside.raise_if_any("prior: outside " + range_text(rule) + " in groups",
                       "Give priors in reward units, NaN for no prior, or pass the reward_range that holds them.");
}

// True if every reward lies in [low, high]: then nobody has to look for the ones that do not. NaN lies nowhere.
template <class Real>
V05_MULTIVERSION bool all_within(const Real* rewards, std::size_t rows, double low, double high) {
  unsigned outside = 0;
  for (std::size_t i = 0; i < rows; ++i) {
    const auto reward = static_cast<double>(rewards[i]);
    outside |= static_cast<unsigned>(!(reward >= low)) | static_cast<unsigned>(!(reward <= high));
  }
  return outside == 0;
}

// Complains about rewards as the rule says, and returns how many valid ones are not finite.
template <class Real>
std::int64_t check_rewards(const Rollouts<Real>& rollouts, const AdvantageRule& rule) {
  constexpr double kLargest = 1e150;  // whose squares are finite
  const double low = rule.bounded() ? rule.low - rule.rounding_slack() : -kLargest;
  const double high = rule.bounded() ? rule.high + rule.rounding_slack() : kLargest;
  if (all_within(rollouts.rewards.data(), rollouts.rewards.size(), low, high)) {
    return 0;
  }
  std::int64_t nonfinite = 0;
  Offenders broken;
  Offenders outside;
  for (std::size_t i = 0; i < rollouts.rewards.size(); ++i) {
    const auto reward = static_cast<double>(rollouts.rewards[i]);
    if (!rollouts.is_valid(i)) {
      continue;
    }
    if (!std::isfinite(reward)) {
      ++nonfinite;
      broken.add(i, reward);
    } else if (reward < low || reward > high) {
      outside.add(i, reward);
    }
  }
  if (!rule.exclude_nonfinite) {
    broken.raise_if_any("rewards: not finite in rows",
                        "Mark them in valid=, or pass nonfinite='exclude' to leave them out and count them.");
  }
  if (rule.bounded()) {
    outside.raise_if_any("rewards: outside " + range_text(rule) + " in rows", "Pass the reward_range that holds them.");
  } else {
    outside.raise_if_any("rewards: beyond 1e150 in rows", "Scale them down.");
  }
  return nonfinite;
}

// What the baseline of a group is made of.
struct Group {
  Moments moments;
  double prior = std::numeric_limits<double>::quiet_NaN();  // reward units; NaN: none
  // kCalibrated's:
  double successes = 0.0;   // sum of the rewards scaled to [0, 1]
  Belief belief;            // what the prior is taken for
  CalibratedFusion fusion;  // of the two, where it is asked for
};

// The sum of a group's rewards scaled to [0, 1]. Whole numbers, as of rewards that are low or high, come back whole:
// where a prior is certain, 1e-16 of a success is far from none.
double successes_of(const Moments& group, const AdvantageRule& rule) {
  const auto count = static_cast<double>(group.count);
  const double sum = group.count == 0 ? 0.0 : std::clamp(count * rule.scaled(group.mean), 0.0, count);
  const double whole = std::floor(sum + 0.5);
  return std::abs(sum - whole) <= count * rule.scaled_rounding() ? whole : sum;
}

Group make_group(const Moments& moments, double prior, const AdvantageRule& rule, bool wants_baseline) {
  Group group;
  group.moments = moments;
  group.prior = prior;
  if (rule.baseline == Baseline::kCalibrated) {
    group.successes = successes_of(moments, rule);
    group.belief = believe(rule.scaled(prior), rule.calibration);
    group.fusion = wants_baseline ? calibrated(moments.count, group.successes, group.belief) : group.fusion;
  }
  return group;
}

double baseline_of(const Group& group, const AdvantageRule& rule) {
  const Moments& m = group.moments;
  return rule.baseline == Baseline::kCalibrated
             ? rule.unscaled(group.fusion.baseline)
             : baseline_of(rule.baseline, m.count, m.mean, group.prior, rule.half_range());
}

// Rewards that are all equal are left as they are: nothing may explode through eps.
double divisor_of(const Moments& population, const AdvantageRule& rule) {
  const bool unscaled = rule.scale == Scale::kNone || population.all_equal;
  return unscaled ? 1.0 : std::sqrt(population.variance()) + rule.eps;
}

// A group's only rollout, with nothing but itself to be compared with. Calibrated fusion always has its vague prior.
bool is_alone(const Group& group, const AdvantageRule& rule) {
  const bool has_prior = rule.baseline == Baseline::kCalibrated || (rule.bounded() && !std::isnan(group.prior));
  return group.moments.count == 1 && !has_prior;
}

// The advantage of a reward within its group.
class Judge {
 public:
  Judge(const Group& group, const AdvantageRule& rule, double divisor)
      : baseline_(baseline_of(group, rule)), divisor_(divisor) {
    if (rule.raw_singleton && is_alone(group, rule)) {
      baseline_ = 0.0;
      divisor_ = 1.0;
    }
  }

  double operator()(double reward, const AdvantageRule& /*rule*/) const { return (reward - baseline_) / divisor_; }

 private:
  double baseline_;
  double divisor_;
};

// The same with a baseline from the group's other rollouts.
class LeaveOneOutJudge {
 public:
  LeaveOneOutJudge(const Group& group, const AdvantageRule& rule, double divisor)
      : mean_(group.moments.mean),
        prior_(group.prior),
        divisor_(divisor),
        others_(is_alone(group, rule) ? kAlone : group.moments.count - 1) {}

  double operator()(double reward, const AdvantageRule& rule) const {
    if (others_ == kAlone) {
      return rule.raw_singleton ? reward : 0.0;
    }
    const double mean = mean_ + (mean_ - reward) / static_cast<double>(others_);
    return (reward - baseline_of(rule.baseline, others_, mean, prior_, rule.half_range())) / divisor_;
  }

 private:
  static constexpr std::int64_t kAlone = -1;
  double mean_;
  double prior_;
  double divisor_;
  std::int64_t others_;
};

// The same for calibrated fusion. Rewards that are all the lowest or the highest have two advantages, which are kept;
// otherwise what the likelihood ratios of a group share is.
class CalibratedLeaveOneOutJudge {
 public:
  CalibratedLeaveOneOutJudge(const Group& group, const AdvantageRule& rule, double divisor)
      : belief_(group.belief),
        successes_(group.successes),
        others_(std::max<std::int64_t>(group.moments.count - 1, 0)),  // no others in an empty group
        divisor_(divisor),
        is_binary_(is_binary(group.moments, rule)) {
    if (!is_binary_ || static_cast<double>(others_) > kFew) {
      ratio_.emplace(belief_.rate, static_cast<double>(others_));
    }
    if (is_binary_) {
      of_lowest_ = compute(rule.low, rule);
      of_highest_ = compute(rule.high, rule);
    }
  }

  double operator()(double reward, const AdvantageRule& rule) const {
    if (is_binary_ && (reward == rule.low || reward == rule.high)) {
      return reward == rule.low ? of_lowest_ : of_highest_;
    }
    return compute(reward, rule);
  }

 private:
  // No sample in a range has a larger variance than one of its ends. What rounding mistakes costs time alone.
  static bool is_binary(const Moments& m, const AdvantageRule& rule) {
    constexpr double kRounding = 1e-9;
    return m.m2 >= (1.0 - kRounding) * static_cast<double>(m.count) * (m.mean - rule.low) * (rule.high - m.mean);
  }

  [[nodiscard]] double compute(double reward, const AdvantageRule& rule) const {
    const auto others = static_cast<double>(others_);
    const double successes = std::clamp(successes_ - rule.scaled(reward), 0.0, others);
    const double ratio = ratio_ ? (*ratio_)(successes) : likelihood_ratio(belief_.rate, successes, others - successes);
    return (reward - rule.unscaled(calibrated(others_, successes, belief_, ratio).baseline)) / divisor_;
  }

  Belief belief_;
  double successes_;
  std::int64_t others_;
  double divisor_;
  bool is_binary_;
  double of_lowest_ = 0.0;
  double of_highest_ = 0.0;
  std::optional<LikelihoodRatio> ratio_;  // none where it is multiplied out
};

void write_statistics(const StatisticsOut& out, std::size_t g, const Group& group, const AdvantageRule& rule) {
  if (out.count.empty()) {
    return;
  }
  const Moments& m = group.moments;
  out.count[g] = m.count;
  out.mean[g] = m.mean;
  out.variance[g] = m.variance();
  out.baseline[g] = baseline_of(group, rule);
  if (rule.baseline == Baseline::kShrinkage) {
    const Fusion fusion = shrinkage(m.count, m.mean, group.prior, rule.half_range());
    out.mse[g] = fusion.mse;
    out.weight[g] = fusion.weight;
    out.statistic[g] = fusion.statistic;
    out.p_value[g] = fusion.p_value();
    out.take_more[g] = osla_take_more(m.count, fusion.squared_bias, rule.max_rollouts, rule.cost);
  }
  if (rule.baseline == Baseline::kCalibrated) {
    out.mse[g] = group.fusion.variance * (rule.high - rule.low) * (rule.high - rule.low);
    out.hallucination[g] = group.fusion.hallucination;
    out.take_more[g] = calibrated_take_more(m.count, group.fusion, rule.max_rollouts, rule.cost);
  }
}

// What a thread takes at a time. Moments of the batch are pooled by blocks of groups, so that their order is fixed.
constexpr std::int64_t kGroupBlock = 256;
constexpr std::int64_t kRowBlock = 4096;
constexpr std::int64_t kTokenRowBlock = 16;  // rows of many tokens
constexpr std::int64_t kPrefetchAhead = 32;

// Calls body(row, table[group of the row]) for the rows begin .. end - 1.
template <class Table, class Body>
void for_rows(const Groups& groups, std::int64_t begin, std::int64_t end, Table* table, const Body& body) {
  if (begin >= end) {
    return;
  }
  if (groups.offsets.empty()) {
    const std::int64_t* const ids = groups.ids.data();
    for (std::int64_t row = begin; row < end;
         ++row) {  // groups in any order: fetched ahead, as the hardware cannot guess
      __builtin_prefetch(&table[ids[std::min(row + kPrefetchAhead, end - 1)]], 1);
      body(at(row), table[ids[row]]);
    }
    return;
  }
  const auto after = std::ranges::upper_bound(groups.offsets, begin);
  auto group = std::distance(groups.offsets.begin(), after) - 1;
  for (std::int64_t row = begin; row < end; ++row) {
    while (groups.offsets[at(group) + 1] <= row) {
      ++group;
    }
    body(at(row), table[group]);
  }
}

// Trajectories are told apart within a group.
struct TrajectoryHash {
  std::size_t operator()(const std::pair<std::int64_t, std::int64_t>& key) const {
    return mix(mix(static_cast<std::uint64_t>(key.first)) ^ static_cast<std::uint64_t>(key.second));
  }
};

// Which rows count in the statistics: the first usable one of each trajectory. Empty without trajectories: all usable
// ones.
template <class Real>
std::vector<std::uint8_t> first_of_trajectories(const Rollouts<Real>& rollouts, const Groups& groups) {
  std::vector<std::uint8_t> is_first(rollouts.trajectory_ids.size());
  std::unordered_map<std::pair<std::int64_t, std::int64_t>, std::size_t, TrajectoryHash> first_rows;
  std::vector<std::int64_t> numbers(at(groups.count));
  std::iota(numbers.begin(), numbers.end(), 0);
  for_rows(groups, 0, std::ssize(is_first), numbers.data(), [&](std::size_t row, std::int64_t group) {
    if (!rollouts.is_usable(row)) {
      return;
    }
    const auto [entry, is_new] = first_rows.try_emplace({group, rollouts.trajectory_ids[row]}, row);
    const std::size_t first = entry->second;
    is_first[row] = static_cast<std::uint8_t>(is_new);
    if (rollouts.rewards[first] != rollouts.rewards[row]) {
      std::ostringstream message;
      message.precision(std::numeric_limits<double>::digits10);
      message << "trajectory_ids: rows " << first << " and " << row << " are one trajectory ("
              << rollouts.trajectory_ids[row] << ") with two rewards (" << rollouts.rewards[first] << ", "
              << rollouts.rewards[row] << "). Give every row of a trajectory the trajectory's reward.";
      throw std::invalid_argument(message.str());
    }
  });
  return is_first;
}

template <class Real>
void collect_moments(const Rollouts<Real>& rollouts, const Groups& groups, MomentsAccumulator* collected, int threads) {
  const auto is_first = first_of_trajectories(rollouts, groups);
  const auto collect = [&](std::int64_t begin, std::int64_t end) {
    for_rows(groups, begin, end, collected, [&](std::size_t row, MomentsAccumulator& group) {
      if (is_first.empty() ? rollouts.is_usable(row) : is_first[row] != 0) {
        group.add(static_cast<double>(rollouts.rewards[row]));
      }
    });
  };
  if (groups.offsets.empty()) {  // on one thread, so that a group's rows are added in their order
    collect(0, rollouts.size());
    return;
  }
  for_blocks(groups.count, kGroupBlock, rollouts.size(), threads,
             [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
               collect(groups.offsets[at(begin)], groups.offsets[at(end)]);
             });
}

// The moments of all rollouts, pooled in group order within blocks, then in block order.
Moments batch_moments(std::span<const MomentsAccumulator> groups, int threads) {
  const auto count = std::ssize(groups);
  std::vector<Moments> blocks(at((count + kGroupBlock - 1) / kGroupBlock));
  for_blocks(count, kGroupBlock, count, threads, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    for (std::int64_t g = begin; g < end; ++g) {
      blocks[at(block)] = merge(blocks[at(block)], groups[at(g)].moments());
    }
  });
  Moments batch;
  for (const Moments& block : blocks) {
    batch = merge(batch, block);
  }
  return batch;
}

template <class GroupJudge, class Real, class Out>
void judge_rows(const Rollouts<Real>& rollouts, const Groups& groups, std::span<const MomentsAccumulator> collected,
                std::span<const double> prior, const AdvantageRule& rule, std::span<Out> advantages,
                const StatisticsOut& statistics, const TokenSteps& steps, int threads) {
  const Moments batch = rule.scale == Scale::kBatch ? batch_moments(collected, threads) : Moments{};
  const bool wants_baseline = !rule.leave_one_out || !statistics.count.empty();
  Scratch<GroupJudge> judges(at(groups.count));
  for_blocks(groups.count, kGroupBlock, groups.count, threads,
             [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
               for (std::int64_t g = begin; g < end; ++g) {
                 const Moments m = collected[at(g)].moments();
                 const double v = prior.empty() ? std::numeric_limits<double>::quiet_NaN() : prior[at(g)];
                 const Group group = make_group(m, v, rule, wants_baseline);
                 write_statistics(statistics, at(g), group, rule);
                 const double divisor = divisor_of(rule.scale == Scale::kBatch ? batch : m, rule);
                 judges.data()[g] = GroupJudge(group, rule, divisor);
               }
             });
  const auto for_advantages = [&](std::int64_t block_size, std::int64_t work, const auto& write) {
    for_blocks(rollouts.size(), block_size, work, threads,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 for_rows(groups, begin, end, judges.data(), [&](std::size_t row, const GroupJudge& judge) {
                   const bool usable = rollouts.is_usable(row);
                   write(row, usable ? judge(static_cast<double>(rollouts.rewards[row]), rule) : 0.0);
                 });
               });
  };
  if (steps.spread) {
    for_advantages(kTokenRowBlock, steps.tokens, steps.spread);
  } else {
    for_advantages(kRowBlock, rollouts.size(),
                   [advantages](std::size_t row, double advantage) { advantages[row] = static_cast<Out>(advantage); });
  }
}

}  // namespace

template <class Real, class Out>
std::int64_t compute_advantages(const Rollouts<Real>& rollouts, const Groups& groups, std::span<const double> prior,
                                const AdvantageRule& rule, std::span<Out> advantages, const StatisticsOut& statistics,
                                const TokenSteps& steps, int threads) {
  if (groups.offsets.empty()) {
    check_ids(groups.ids, groups.count);
  }
  if (rule.bounded()) {
    check_prior(prior, rule);
  }
  if (steps.sum) {
    for_blocks(rollouts.size(), kTokenRowBlock, steps.tokens, threads,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   steps.sum(at(row));
                 }
               });
  }
  const std::int64_t nonfinite = check_rewards(rollouts, rule);
  Scratch<MomentsAccumulator> collected(at(groups.count));
  collect_moments(rollouts, groups, collected.data(), threads);
  const std::span<const MomentsAccumulator> of_groups(collected.data(), at(groups.count));
  const auto leave_one_out = rule.baseline == Baseline::kCalibrated ? judge_rows<CalibratedLeaveOneOutJudge, Real, Out>
                                                                    : judge_rows<LeaveOneOutJudge, Real, Out>;
  const auto judge = rule.leave_one_out ? leave_one_out : judge_rows<Judge, Real, Out>;
  judge(rollouts, groups, of_groups, prior, rule, advantages, statistics, steps, threads);
  return nonfinite;
}

// As many sums side by side as two 512-bit registers hold. The lanes are added in a fixed order, whatever the
// registers. A whole block of zeros, which is what most token rewards are, changes no lane and is passed over without
// a look at its mask.
constexpr std::size_t kLanes = 16;
constexpr std::size_t kZeroBlock = 64;

template <class Reward, class Mask>
V05_MULTIVERSION double sum_row(const Reward* rewards, const Mask* mask, std::size_t tokens) {
  // Rewards are kept or cleared as bits: `mask ? reward : 0` becomes a masked load that g++ 12 gets wrong here.
  using Bits = std::conditional_t<sizeof(Reward) == sizeof(std::uint32_t), std::uint32_t, std::uint64_t>;
  const auto kept = [&](std::size_t t) {
    return std::bit_cast<Reward>(std::bit_cast<Bits>(rewards[t]) & (mask[t] != Mask{0} ? ~Bits{0} : Bits{0}));
  };
  std::array<double, kLanes> lanes{};
  std::size_t t = 0;
  for (; t + kZeroBlock <= tokens; t += kZeroBlock) {
    Bits any = 0;
    for (std::size_t i = 0; i < kZeroBlock; ++i) {
      any |= std::bit_cast<Bits>(rewards[t + i]);
    }
    for (std::size_t part = 0; any != 0 && part < kZeroBlock; part += kLanes) {
      std::array<Reward, kLanes> values{};
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        values[lane] = kept(t + part + lane);
      }
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(values[lane]);
      }
    }
  }
  for (; t < tokens; ++t) {
    lanes[t % kLanes] += static_cast<double>(kept(t));
  }
  double sum = 0.0;
  for (const double lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <class Out, class Mask>
V05_MULTIVERSION void spread_row(Out advantage, const Mask* mask, std::size_t tokens, Out* out) {
  for (std::size_t t = 0; t < tokens; ++t) {
    out[t] = mask[t] != Mask{0} ? advantage : Out{0};
  }
}

template <class Out>
V05_MULTIVERSION void fill_row(Out advantage, std::size_t tokens, Out* out) {
  for (std::size_t t = 0; t < tokens; ++t) {
    out[t] = advantage;
  }
}

// clang-format off
#define V05_FOR_REWARDS(Real, Out)                                                                                      \
  template std::int64_t compute_advantages<Real, Out>(const Rollouts<Real>&, const Groups&, std::span<const double>,    \
                                                      const AdvantageRule&, std::span<Out>, const StatisticsOut&, \
                                                      const TokenSteps&, int);
V05_FOR_REWARDS(float, float)
V05_FOR_REWARDS(float, double)
V05_FOR_REWARDS(double, float)
V05_FOR_REWARDS(double, double)
#undef V05_FOR_REWARDS
#define V05_FOR_MASK(Mask)                                                             \
  template double sum_row<float, Mask>(const float*, const Mask*, std::size_t);        \
  template double sum_row<double, Mask>(const double*, const Mask*, std::size_t);      \
  template void spread_row<float, Mask>(float, const Mask*, std::size_t, float*);      \
  template void spread_row<double, Mask>(double, const Mask*, std::size_t, double*);
V05_FOR_MASK(std::uint8_t)
V05_FOR_MASK(std::int64_t)
V05_FOR_MASK(float)
#undef V05_FOR_MASK
template void fill_row<float>(float, std::size_t, float*);
template void fill_row<double>(double, std::size_t, double*);
// clang-format on

}  // namespace v05
