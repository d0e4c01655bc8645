#include "v05/advantage.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "v05/multiversion.hpp"
#include "v05/offenders.hpp"
#include "v05/parallel.hpp"
#include "v05/stopping.hpp"

namespace v05 {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

std::string range_text(const AdvantageRule& rule) {
  std::ostringstream text;
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
  constexpr double kFinite = std::numeric_limits<double>::max();
  const double low = rule.bounded() ? rule.low - rule.rounding_slack() : -kFinite;
  const double high = rule.bounded() ? rule.high + rule.rounding_slack() : kFinite;
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
  outside.raise_if_any("rewards: outside " + range_text(rule) + " in rows", "Pass the reward_range that holds them.");
  return nonfinite;
}

// The moments of groups: of the rewards of their usable rows, each trajectory once. Keeps its scratch between groups.
template <class Real>
class GroupMoments {
 public:
  GroupMoments(const Rollouts<Real>& rollouts, const Groups& groups) : rollouts_(rollouts), groups_(groups) {}

  Moments of(std::int64_t group) {
    const std::int64_t begin = groups_.offsets[at(group)];
    const std::int64_t end = groups_.offsets[at(group) + 1];
    if (rewards_.size() < at(end - begin)) {
      rewards_.resize(2 * at(end - begin));
    }
    const bool has_trajectories = !rollouts_.trajectory_ids.empty();
    if (has_trajectories) {
      seen_.clear();
    }
    std::size_t count = 0;
    for (std::int64_t p = begin; p < end; ++p) {
      const std::size_t row = at(groups_.row(p));
      rewards_[count] = static_cast<double>(rollouts_.rewards[row]);
      count += static_cast<std::size_t>(rollouts_.is_usable(row) && (!has_trajectories || is_new_trajectory(row)));
    }
    return moments(std::span<const double>(rewards_).first(count));
  }

 private:
  bool is_new_trajectory(std::size_t row) {
    const auto [entry, inserted] = seen_.try_emplace(rollouts_.trajectory_ids[row], row);
    if (!inserted && rollouts_.rewards[entry->second] != rollouts_.rewards[row]) {
      std::ostringstream message;
      message << "trajectory_ids: rows " << entry->second << " and " << row << " are one trajectory ("
              << rollouts_.trajectory_ids[row] << ") with two rewards (" << rollouts_.rewards[entry->second] << ", "
              << rollouts_.rewards[row] << "). Give every row of a trajectory the trajectory's reward.";
      throw std::invalid_argument(message.str());
    }
    return inserted;
  }

  const Rollouts<Real>& rollouts_;
  const Groups& groups_;
  std::vector<double> rewards_;
  std::unordered_map<std::int64_t, std::size_t> seen_;
};

// Rewards that are all equal are left as they are: nothing may explode through eps.
double divisor(const Moments& population, double eps) {
  return population.all_equal ? 1.0 : std::sqrt(population.variance()) + eps;
}

// The advantage of a reward within one group.
class GroupAdvantage {
 public:
  GroupAdvantage(const Moments& group, double prior, const AdvantageRule& rule, const Moments& population)
      : group_(group),
        prior_(prior),
        rule_(rule),
        alone_(group.count == 1 && (!rule.bounded() || std::isnan(prior))),
        baseline_(baseline_of(rule.baseline, group.count, group.mean, prior, rule.half_range())),
        divisor_(rule.scale == Scale::kNone ? 1.0 : divisor(population, rule.eps)) {}

  double operator()(double reward) const {
    if (alone_) {  // nothing to be compared with
      return rule_.raw_singleton ? reward : 0.0;
    }
    if (!rule_.leave_one_out) {
      return (reward - baseline_) / divisor_;
    }
    const std::int64_t others = group_.count - 1;
    const double mean = group_.mean + (group_.mean - reward) / static_cast<double>(others);
    return (reward - baseline_of(rule_.baseline, others, mean, prior_, rule_.half_range())) / divisor_;
  }

 private:
  const Moments& group_;
  double prior_;
  const AdvantageRule& rule_;
  bool alone_;
  double baseline_;
  double divisor_;
};

void write_statistics(const StatisticsOut& out, std::size_t g, const Moments& m, double prior,
                      const AdvantageRule& rule) {
  if (out.count.empty()) {
    return;
  }
  out.count[g] = m.count;
  out.mean[g] = m.mean;
  out.variance[g] = m.variance();
  out.baseline[g] = baseline_of(rule.baseline, m.count, m.mean, prior, rule.half_range());
  if (rule.baseline == Baseline::kShrinkage) {
    const Fusion fusion = shrinkage(m.count, m.mean, prior, rule.half_range());
    out.weight[g] = fusion.weight;
    out.statistic[g] = fusion.statistic;
    out.p_value[g] = fusion.p_value();
    out.mse[g] = fusion.mse;
    out.take_more[g] = osla_take_more(m.count, fusion.squared_bias, rule.max_rollouts, rule.cost);
  }
}

// Groups a thread takes at a time. Moments of the batch are pooled by such blocks, so that their order is fixed.
constexpr std::int64_t kGroupBlock = 256;
constexpr std::int64_t kRowBlock = 16;
constexpr std::int64_t kPrefetchAhead = 32;

// The moments of all rollouts, pooled in group order within blocks, then in block order.
template <class Real>
Moments batch_moments(const Rollouts<Real>& rollouts, const Groups& groups, int threads) {
  std::vector<Moments> blocks(at((groups.size() + kGroupBlock - 1) / kGroupBlock));
  const auto pool = [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    GroupMoments<Real> group_moments(rollouts, groups);
    for (std::int64_t g = begin; g < end; ++g) {
      blocks[at(block)] = merge(blocks[at(block)], group_moments.of(g));
    }
  };
  for_blocks(groups.size(), kGroupBlock, rollouts.size(), threads, pool);
  Moments batch;
  for (const Moments& block : blocks) {
    batch = merge(batch, block);
  }
  return batch;
}

template <class Real, class Out>
void judge_group(const Rollouts<Real>& rollouts, const Groups& groups, std::int64_t g, const GroupAdvantage& judge,
                 std::span<Out> advantages) {
  for (std::int64_t p = groups.offsets[at(g)]; p < groups.offsets[at(g) + 1]; ++p) {
    if (!groups.order.empty()) {  // rows in any order: fetched ahead, as the hardware cannot guess them
      const std::size_t ahead = at(groups.row(std::min(p + kPrefetchAhead, rollouts.size() - 1)));
      __builtin_prefetch(&rollouts.rewards[ahead]);
      __builtin_prefetch(&advantages[ahead], 1);
    }
    const std::size_t row = at(groups.row(p));
    const double advantage = rollouts.is_usable(row) ? judge(static_cast<double>(rollouts.rewards[row])) : 0.0;
    advantages[row] = static_cast<Out>(advantage);
  }
}

using Step = std::function<void(std::size_t row)>;

void for_rows_of(const Groups& groups, std::int64_t g, const Step& step) {
  if (step) {
    for (std::int64_t p = groups.offsets[at(g)]; p < groups.offsets[at(g) + 1]; ++p) {
      step(at(groups.row(p)));
    }
  }
}

void for_all_rows(const Step& step, std::int64_t rows, std::int64_t tokens, int threads) {
  if (step) {
    const auto take = [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        step(at(row));
      }
    };
    for_blocks(rows, kRowBlock, tokens, threads, take);
  }
}

}  // namespace

template <class Real, class Out>
std::int64_t compute_advantages(const Rollouts<Real>& rollouts, const Groups& groups, std::span<const double> prior,
                                const AdvantageRule& rule, std::span<Out> advantages, const StatisticsOut& statistics,
                                const TokenSteps& steps, int threads) {
  if (rule.bounded()) {
    check_prior(prior, rule);
  }
  // A group's tokens are summed and spread while they are in the cache, unless its statistics need other groups' sums
  // or there are too few groups to share among the threads.
  const bool by_group = rule.scale != Scale::kBatch && groups.size() >= threads;
  const bool sums_by_group = by_group && steps.sum;
  if (!by_group) {
    for_all_rows(steps.sum, rollouts.size(), steps.tokens, threads);
  }
  std::int64_t nonfinite = sums_by_group ? 0 : check_rewards(rollouts, rule);
  const Moments batch = rule.scale == Scale::kBatch ? batch_moments(rollouts, groups, threads) : Moments{};

  const auto judge_groups = [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
    GroupMoments<Real> group_moments(rollouts, groups);
    for (std::int64_t g = begin; g < end; ++g) {
      if (by_group) {
        for_rows_of(groups, g, steps.sum);
      }
      const Moments m = group_moments.of(g);
      const double v = prior.empty() ? std::numeric_limits<double>::quiet_NaN() : prior[at(g)];
      write_statistics(statistics, at(g), m, v, rule);
      judge_group(rollouts, groups, g, GroupAdvantage(m, v, rule, rule.scale == Scale::kBatch ? batch : m), advantages);
      if (by_group) {
        for_rows_of(groups, g, steps.spread);
      }
    }
  };
  const std::int64_t block = by_group && steps.tokens > 0 ? 1 : kGroupBlock;
  for_blocks(groups.size(), block, std::max(rollouts.size(), by_group ? steps.tokens : 0), threads, judge_groups);
  if (sums_by_group) {
    nonfinite = check_rewards(rollouts, rule);
  }
  if (!by_group) {
    for_all_rows(steps.spread, rollouts.size(), steps.tokens, threads);
  }
  return nonfinite;
}

// As many sums side by side as two 512-bit registers hold. The lanes are added in a fixed order, whatever the
// registers.
constexpr std::size_t kLanes = 16;

template <class Reward, class Mask>
V05_MULTIVERSION double sum_row(const Reward* rewards, const Mask* mask, std::size_t tokens) {
  std::array<double, kLanes> lanes{};
  const std::size_t whole = tokens - tokens % kLanes;
  for (std::size_t t = 0; t < whole; t += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const auto reward = static_cast<double>(rewards[t + lane]);  // read in any case: see above
      lanes[lane] += mask[t + lane] != Mask{0} ? reward : 0.0;
    }
  }
  for (std::size_t t = whole; t < tokens; ++t) {
    lanes[t - whole] += mask[t] != Mask{0} ? static_cast<double>(rewards[t]) : 0.0;
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
