#include "v05/advantage.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "v05/stopping.hpp"

namespace v05 {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Collects offending positions and turns them into one readable complaint.
class Offenders {
 public:
  void add(std::size_t position, double value) {
    if (positions_.size() < kShown) {
      positions_.push_back(position);
      values_.push_back(value);
    }
    ++count_;
  }

  void raise_if_any(const std::string& what, const std::string& remedy) const {
    if (count_ == 0) {
      return;
    }
    std::ostringstream message;
    message << what << ' ';
    for (std::size_t i = 0; i < positions_.size(); ++i) {
      message << (i > 0 ? ", " : "") << positions_[i] << " (" << values_[i] << ')';
    }
    if (count_ > positions_.size()) {
      message << " and " << count_ - positions_.size() << " more";
    }
    message << ". " << remedy;
    throw std::invalid_argument(message.str());
  }

 private:
  static constexpr std::size_t kShown = 8;
  std::vector<std::size_t> positions_;
  std::vector<double> values_;
  std::size_t count_ = 0;
};

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

// Which rows take part: valid and finite. Complains about the rest as the rule says.
std::vector<std::uint8_t> usable_rows(const Rollouts& rollouts, const AdvantageRule& rule, std::int64_t* nonfinite) {
  std::vector<std::uint8_t> usable(rollouts.rewards.size(), 1);
  const double slack = rule.rounding_slack();
  Offenders broken;
  Offenders outside;
  for (std::size_t i = 0; i < usable.size(); ++i) {
    const double reward = rollouts.rewards[i];
    if (!rollouts.valid.empty() && rollouts.valid[i] == 0) {
      usable[i] = 0;
    } else if (!std::isfinite(reward)) {
      usable[i] = 0;
      ++*nonfinite;
      broken.add(i, reward);
    } else if (rule.bounded() && (reward < rule.low - slack || reward > rule.high + slack)) {
      outside.add(i, reward);
    }
  }
  if (!rule.exclude_nonfinite) {
    broken.raise_if_any("rewards: not finite in rows",
                        "Mark them in valid=, or pass nonfinite='exclude' to leave them out and count them.");
  }
  outside.raise_if_any("rewards: outside " + range_text(rule) + " in rows", "Pass the reward_range that holds them.");
  return usable;
}

// The rewards that count in a group's statistics: those of its usable rows, each trajectory once.
class GroupRewards {
 public:
  GroupRewards(const Rollouts& rollouts, const Groups& groups, std::span<const std::uint8_t> usable)
      : rollouts_(rollouts), groups_(groups), usable_(usable) {}

  std::span<const double> of(std::int64_t group) {
    rewards_.clear();
    seen_.clear();
    for (std::int64_t p = groups_.offsets[at(group)]; p < groups_.offsets[at(group) + 1]; ++p) {
      const std::size_t row = at(groups_.row(p));
      if (usable_[row] != 0 && is_new_trajectory(row)) {
        rewards_.push_back(rollouts_.rewards[row]);
      }
    }
    return rewards_;
  }

 private:
  bool is_new_trajectory(std::size_t row) {
    if (rollouts_.trajectory_ids.empty()) {
      return true;
    }
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

  const Rollouts& rollouts_;
  const Groups& groups_;
  std::span<const std::uint8_t> usable_;
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

}  // namespace

Grouping group_rows(std::span<const std::int64_t> ids, std::int64_t num_groups) {
  std::vector<std::int64_t> dense(ids.begin(), ids.end());
  std::int64_t groups = num_groups;
  if (num_groups < 0) {
    std::unordered_map<std::int64_t, std::int64_t> slots;
    for (std::int64_t& id : dense) {
      id = slots.try_emplace(id, static_cast<std::int64_t>(slots.size())).first->second;
    }
    groups = static_cast<std::int64_t>(slots.size());
  } else {
    Offenders outside;
    for (std::size_t i = 0; i < dense.size(); ++i) {
      if (dense[i] < 0 || dense[i] >= num_groups) {
        outside.add(i, static_cast<double>(dense[i]));
      }
    }
    outside.raise_if_any("group_ids: outside [0, num_groups=" + std::to_string(num_groups) + ") in rows",
                         "With num_groups an id is its group's position; leave num_groups out for ids of any value.");
  }

  Grouping grouping{
      .order = std::vector<std::int64_t>(dense.size()),
      .offsets = std::vector<std::int64_t>(at(groups) + 1),
  };
  for (const std::int64_t id : dense) {
    ++grouping.offsets[at(id) + 1];
  }
  std::partial_sum(grouping.offsets.begin(), grouping.offsets.end(), grouping.offsets.begin());
  std::vector<std::int64_t> next(grouping.offsets.begin(), grouping.offsets.end() - 1);
  for (std::size_t i = 0; i < dense.size(); ++i) {
    grouping.order[at(next[at(dense[i])]++)] = static_cast<std::int64_t>(i);
  }
  return grouping;
}

std::int64_t compute_advantages(const Rollouts& rollouts, const Groups& groups, std::span<const double> prior,
                                const AdvantageRule& rule, std::span<double> advantages,
                                const StatisticsOut& statistics) {
  if (rule.bounded()) {
    check_prior(prior, rule);
  }
  std::int64_t nonfinite = 0;
  const std::vector<std::uint8_t> usable = usable_rows(rollouts, rule, &nonfinite);

  std::vector<Moments> group_moments(at(groups.size()));
  GroupRewards rewards(rollouts, groups, usable);
  Moments batch;
  for (std::int64_t g = 0; g < groups.size(); ++g) {
    group_moments[at(g)] = moments(rewards.of(g));
    batch = rule.scale == Scale::kBatch ? merge(batch, group_moments[at(g)]) : batch;
  }

  for (std::int64_t g = 0; g < groups.size(); ++g) {
    const Moments& m = group_moments[at(g)];
    const double v = prior.empty() ? std::numeric_limits<double>::quiet_NaN() : prior[at(g)];
    write_statistics(statistics, at(g), m, v, rule);
    const GroupAdvantage judge(m, v, rule, rule.scale == Scale::kBatch ? batch : m);
    for (std::int64_t p = groups.offsets[at(g)]; p < groups.offsets[at(g) + 1]; ++p) {
      const std::size_t row = at(groups.row(p));
      advantages[row] = usable[row] != 0 ? judge(rollouts.rewards[row]) : 0.0;
    }
  }
  return nonfinite;
}

template <class Reward, class Mask>
void sum_token_rewards(std::span<const Reward> token_rewards, std::span<const Mask> mask, std::span<double> rewards) {
  const std::size_t tokens = rewards.empty() ? 0 : token_rewards.size() / rewards.size();
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    double sum = 0.0;
    for (std::size_t t = i * tokens; t < (i + 1) * tokens; ++t) {
      sum += mask[t] != Mask{0} ? static_cast<double>(token_rewards[t]) : 0.0;
    }
    rewards[i] = sum;
  }
}

template <class Out, class Mask>
void spread_padded(std::span<const double> advantages, std::span<const Mask> mask, std::span<Out> out) {
  const std::size_t tokens = advantages.empty() ? 0 : out.size() / advantages.size();
  for (std::size_t i = 0; i < advantages.size(); ++i) {
    const auto advantage = static_cast<Out>(advantages[i]);
    for (std::size_t t = i * tokens; t < (i + 1) * tokens; ++t) {
      out[t] = mask[t] != Mask{0} ? advantage : Out{0};
    }
  }
}

template <class Out>
void spread_packed(std::span<const double> advantages, std::span<const std::int64_t> cu_seqlens, std::span<Out> out) {
  for (std::size_t i = 0; i < advantages.size(); ++i) {
    std::fill(out.begin() + cu_seqlens[i], out.begin() + cu_seqlens[i + 1], static_cast<Out>(advantages[i]));
  }
}

// clang-format off
#define V05_FOR_MASK(Mask)                                                                                              \
  template void sum_token_rewards<float, Mask>(std::span<const float>, std::span<const Mask>, std::span<double>);       \
  template void sum_token_rewards<double, Mask>(std::span<const double>, std::span<const Mask>, std::span<double>);     \
  template void spread_padded<float, Mask>(std::span<const double>, std::span<const Mask>, std::span<float>);           \
  template void spread_padded<double, Mask>(std::span<const double>, std::span<const Mask>, std::span<double>);
V05_FOR_MASK(std::uint8_t)
V05_FOR_MASK(std::int64_t)
V05_FOR_MASK(float)
#undef V05_FOR_MASK
template void spread_packed<float>(std::span<const double>, std::span<const std::int64_t>, std::span<float>);
template void spread_packed<double>(std::span<const double>, std::span<const std::int64_t>, std::span<double>);
// clang-format on

}  // namespace v05
