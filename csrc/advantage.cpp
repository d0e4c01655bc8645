#include "v05/advantage.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
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
  if (outside.any()) {
    outside.raise("prior: outside " + range_text(rule) + " in groups",
                  "Give priors in reward units, NaN for no prior, or pass the reward_range that holds them.");
  }
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

// Squares of differences between smaller rewards underflow, so that rewards that differ have a deviation of 0. An eps
// keeps the divisor from it.
template <class Real>
void check_smallest(const Rollouts<Real>& rollouts, const AdvantageRule& rule) {
  constexpr double kSmallest = 1e-130;  // the difference of neighbouring doubles of this size is 2e-146
  if (rule.scale == Scale::kNone || rule.eps >= kSmallest) {
    return;
  }
  Offenders small;
  for (std::size_t i = 0; i < rollouts.rewards.size(); ++i) {
    const auto reward = static_cast<double>(rollouts.rewards[i]);
    if (rollouts.is_valid(i) && reward != 0.0 && std::abs(reward) < kSmallest) {
      small.add(i, reward);
    }
  }
  if (small.any()) {
    small.raise("rewards: nearer to 0 than 1e-130 in rows",
                "Give an eps above 0, or scale them up: their deviation, which divides them, would be rounded to 0.");
  }
}

// Complains about rewards as the rule says, and returns whether all valid ones are finite.
template <class Real>
bool check_rewards(const Rollouts<Real>& rollouts, const AdvantageRule& rule) {
  check_smallest(rollouts, rule);
  constexpr double kLargest = 1e150;  // whose squares are finite
  const double low = rule.bounded() ? rule.low - rule.rounding_slack() : -kLargest;
  const double high = rule.bounded() ? rule.high + rule.rounding_slack() : kLargest;
  if (all_within(rollouts.rewards.data(), rollouts.rewards.size(), low, high)) {
    return true;
  }
  Offenders broken;
  Offenders outside;
  for (std::size_t i = 0; i < rollouts.rewards.size(); ++i) {
    const auto reward = static_cast<double>(rollouts.rewards[i]);
    if (!rollouts.is_valid(i)) {
      continue;
    }
    if (!std::isfinite(reward)) {
      broken.add(i, reward);
    } else if (reward < low || reward > high) {
      outside.add(i, reward);
    }
  }
  if (broken.any() && !rule.exclude_nonfinite) {
    broken.raise("rewards: not finite in rows",
                 "Mark them in valid=, or pass nonfinite='exclude' to leave them out and count them.");
  }
  if (outside.any() && rule.bounded()) {
    outside.raise("rewards: outside " + range_text(rule) + " in rows", "Pass the reward_range that holds them.");
  }
  if (outside.any()) {
    outside.raise("rewards: beyond 1e150 in rows", "Scale them down.");
  }
  return !broken.any();
}

// Calls body(row, group of the row) for all rows that are of a group.
template <class Body>
void for_rows(std::size_t rows, const Groups& groups, const Body& body) {
  const std::size_t count = at(groups.count);
  if (groups.offsets.empty()) {
    for (std::size_t row = 0; row < rows; ++row) {
      if (const std::size_t group = groups.named_by(row); group < count) {
        body(row, group);
      }
    }
    return;
  }
  for (std::size_t group = 0; group < count; ++group) {
    const Part own = part_of(groups.offsets, group, rows);
    for (std::size_t row = own.begin; row < own.end; ++row) {
      body(row, group);
    }
  }
}

// What the baseline of a group is made of.
struct Group {
  Moments moments;
  double prior;  // reward units; NaN: none

  Group(const Moments& of_rewards, double predicted, const AdvantageRule& /*rule*/, bool /*wants_baseline*/)
      : moments(of_rewards), prior(predicted) {}

  [[nodiscard]] double baseline(const AdvantageRule& rule) const {
    return baseline_of(rule.baseline, moments.count, moments.mean, prior, rule.half_range());
  }

  // Its only rollout has nothing but itself to be compared with.
  [[nodiscard]] bool is_alone(const AdvantageRule& rule) const {
    return moments.count == 1 && (!rule.bounded() || std::isnan(prior));
  }
};

// The sum of a group's rewards scaled to [0, 1]. Whole numbers, as of rewards that are low or high, come back whole:
// where a prior is certain, 1e-16 of a success is far from none.
double successes_of(const Moments& group, const AdvantageRule& rule) {
  const auto count = static_cast<double>(group.count);
  const double sum = group.count == 0 ? 0.0 : std::clamp(count * rule.scaled(group.mean), 0.0, count);
  const double whole = std::floor(sum + 0.5);
  return std::abs(sum - whole) <= count * rule.scaled_rounding() ? whole : sum;
}

// The same for calibrated fusion.
struct CalibratedGroup {
  Moments moments;
  double successes;         // sum of the rewards scaled to [0, 1]
  Belief belief;            // what the prior is taken for
  CalibratedFusion fusion;  // of the two, where the baseline is wanted

  CalibratedGroup(const Moments& of_rewards, double prior, const AdvantageRule& rule, bool wants_baseline)
      : moments(of_rewards),
        successes(successes_of(of_rewards, rule)),
        belief(believe(rule.scaled(prior), rule.calibration)),
        fusion(wants_baseline ? calibrated(moments.count, successes, belief) : CalibratedFusion{}) {}

  [[nodiscard]] double baseline(const AdvantageRule& rule) const { return rule.unscaled(fusion.baseline); }

  // Never: there is always the vague prior.
  [[nodiscard]] static bool is_alone(const AdvantageRule& /*rule*/) { return false; }
};

// Rewards that are all equal are left as they are: nothing may explode through eps.
double divisor_of(const Moments& population, const AdvantageRule& rule) {
  const bool unscaled = rule.scale == Scale::kNone || population.all_equal;
  return unscaled ? 1.0 : std::sqrt(population.variance()) + rule.eps;
}

// The advantage of a reward within its group.
template <class GroupKind>
class Judge {
 public:
  using Kind = GroupKind;

  Judge(const GroupKind& group, const AdvantageRule& rule, double divisor)
      : baseline_(group.baseline(rule)), divisor_(divisor) {
    if (rule.raw_singleton && group.is_alone(rule)) {
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
  using Kind = Group;

  LeaveOneOutJudge(const Group& group, const AdvantageRule& rule, double divisor)
      : mean_(group.moments.mean),
        prior_(group.prior),
        divisor_(divisor),
        others_(group.is_alone(rule) ? kAlone : group.moments.count - 1) {}

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
  using Kind = CalibratedGroup;

  CalibratedLeaveOneOutJudge(const CalibratedGroup& group, const AdvantageRule& rule, double divisor)
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

template <class GroupKind>
void write_moments(const StatisticsOut& out, std::size_t g, const GroupKind& group, const AdvantageRule& rule) {
  out.count[g] = static_cast<double>(group.moments.count);
  out.nonfinite[g] = 0.0;  // until they are counted
  out.clipped[g] = 0.0;
  out.mean[g] = group.moments.mean;
  out.variance[g] = group.moments.variance();
  out.baseline[g] = group.baseline(rule);
}

void write_statistics(const StatisticsOut& out, std::size_t g, const Group& group, const AdvantageRule& rule) {
  const Moments& m = group.moments;
  write_moments(out, g, group, rule);
  if (rule.baseline == Baseline::kShrinkage) {
    const Fusion fusion = shrinkage(m.count, m.mean, group.prior, rule.half_range());
    out.mse[g] = fusion.mse;
    out.weight[g] = fusion.weight;
    out.statistic[g] = fusion.statistic;
    out.p_value[g] = fusion.p_value();
    out.take_more[g] = osla_take_more(m.count, fusion.squared_bias, rule.max_rollouts, rule.cost) ? 1.0 : 0.0;
  }
}

void write_statistics(const StatisticsOut& out, std::size_t g, const CalibratedGroup& group,
                      const AdvantageRule& rule) {
  write_moments(out, g, group, rule);
  out.mse[g] = group.fusion.variance * (rule.high - rule.low) * (rule.high - rule.low);
  out.hallucination[g] = group.fusion.hallucination;
  out.take_more[g] = calibrated_take_more(group.moments.count, group.fusion, rule.max_rollouts, rule.cost) ? 1.0 : 0.0;
}

// What a thread takes at a time. Moments of the batch are pooled by blocks of groups, so that their order is fixed.
constexpr std::int64_t kGroupBlock = 256;
constexpr std::int64_t kRowBlock = 4096;
constexpr std::int64_t kTokenRowBlock = 16;  // rows of many tokens
constexpr std::int64_t kPrefetchAhead = 32;

// Calls body(row, table[id of the row]) for the rows begin .. end - 1, fetched ahead, as the hardware cannot guess. The
// table has an entry more than there are groups, for ids that another thread has changed.
template <class Entry, class Body>
[[gnu::flatten]] void for_scattered(const Groups& groups, std::int64_t begin, std::int64_t end, Entry* table,
                                    const Body& body) {
  for (std::int64_t row = begin; row < end; ++row) {
    __builtin_prefetch(&table[groups.named_by(at(std::min(row + kPrefetchAhead, end - 1)))], 1);
    body(at(row), table[groups.named_by(at(row))]);
  }
}

// Trajectories are told apart within a group.
struct TrajectoryHash {
  std::size_t operator()(const std::pair<std::size_t, std::int64_t>& key) const {
    return mix(mix(key.first) ^ static_cast<std::uint64_t>(key.second));
  }
};

// Which rows count in the statistics: the first usable one of each trajectory. Empty without trajectories: all usable
// ones.
template <class Real>
std::vector<std::uint8_t> first_of_trajectories(const Rollouts<Real>& rollouts, const Groups& groups) {
  std::vector<std::uint8_t> is_first(rollouts.trajectory_ids.size());
  std::unordered_map<std::pair<std::size_t, std::int64_t>, std::size_t, TrajectoryHash> first_rows;
  for_rows(is_first.size(), groups, [&](std::size_t row, std::size_t group) {
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

// The advantages of a batch whose rewards were checked; `all_usable` if no row is left out. Throws where a trajectory
// has two rewards.
template <class Real, class Out>
class Advantages {
 public:
  Advantages(const Rollouts<Real>& rollouts, const Groups& groups, std::span<const double> prior,
             const AdvantageRule& rule, std::span<Out> advantages, const StatisticsOut& statistics, bool all_usable,
             int threads)
      : rollouts_(rollouts),
        groups_(groups),
        prior_(prior),
        rule_(rule),
        advantages_(advantages),
        statistics_(statistics),
        is_first_(first_of_trajectories(rollouts, groups)),
        all_usable_(all_usable),
        threads_(threads) {}

  template <class GroupJudge>
  void compute() const {
    if (groups_.offsets.empty()) {
      judge_scattered<GroupJudge>();
    } else {
      judge_contiguous<GroupJudge>();
    }
  }

 private:
  // A group at a time, without scratch.
  template <class GroupJudge>
  void judge_contiguous() const {
    const Moments batch = batch_moments([this](std::int64_t g) { return collect(rows_of(g)); });
    const std::int64_t groups_of_rows = kRowBlock * groups_.count / std::max<std::int64_t>(1, rollouts_.size());
    for_blocks(groups_.count, std::clamp<std::int64_t>(groups_of_rows, 1, kGroupBlock), rollouts_.size(), threads_,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 judge_groups<GroupJudge>(begin, end, batch);
               });
  }

  // Flat: numbers of a group that pass through memory between calls cost more than their arithmetic.
  template <class GroupJudge>
  [[gnu::flatten]] void judge_groups(std::int64_t begin, std::int64_t end, const Moments& batch) const {
    for (std::int64_t g = begin; g < end; ++g) {
      const Part own = rows_of(g);
      const auto judge = judge_of<GroupJudge>(g, collect(own), batch);
      for (std::size_t row = own.begin; row < own.end; ++row) {
        write(row, judge);
      }
    }
  }

  // Over tables of the groups.
  template <class GroupJudge>
  void judge_scattered() const {
    const Scratch<MomentsAccumulator> collected(at(groups_.count) + 1);
    // On one thread, so that a group's rows are added in their order.
    for_scattered(groups_, 0, rollouts_.size(), collected.data(),
                  [this](std::size_t row, MomentsAccumulator& group) { add_row(row, group); });
    const auto moments_of = [&](std::int64_t g) { return collected.data()[g].moments(); };
    const Moments batch = batch_moments(moments_of);
    const Scratch<GroupJudge> judges(at(groups_.count) + 1);
    for_blocks(groups_.count, kGroupBlock, groups_.count, threads_,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 for (std::int64_t g = begin; g < end; ++g) {
                   judges.data()[g] = judge_of<GroupJudge>(g, moments_of(g), batch);
                 }
               });
    for_blocks(rollouts_.size(), kRowBlock, rollouts_.size(), threads_,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 for_scattered(groups_, begin, end, judges.data(),
                               [this](std::size_t row, const GroupJudge& judge) { write(row, judge); });
               });
  }

  [[nodiscard]] Moments collect(Part rows) const {
    MomentsAccumulator group;
    for (std::size_t row = rows.begin; row < rows.end; ++row) {
      add_row(row, group);
    }
    return group.moments();
  }

  [[nodiscard]] Part rows_of(std::int64_t g) const { return part_of(groups_.offsets, at(g), rollouts_.rewards.size()); }

  void add_row(std::size_t row, MomentsAccumulator& group) const {
    if (is_first_.empty() ? all_usable_ || rollouts_.is_usable(row) : is_first_[row] != 0) {
      group.add(static_cast<double>(rollouts_.rewards[row]));
    }
  }

  template <class GroupJudge>
  void write(std::size_t row, const GroupJudge& judge) const {
    const bool usable = all_usable_ || rollouts_.is_usable(row);
    advantages_[row] = static_cast<Out>(usable ? judge(static_cast<double>(rollouts_.rewards[row]), rule_) : 0.0);
  }

  // The moments of all rollouts, where the scale wants them: pooled in group order within blocks, then in block order.
  template <class MomentsOf>
  [[nodiscard]] Moments batch_moments(const MomentsOf& moments_of) const {
    Moments batch;
    if (rule_.scale != Scale::kBatch) {
      return batch;
    }
    std::vector<Moments> blocks(at((groups_.count + kGroupBlock - 1) / kGroupBlock));
    for_blocks(groups_.count, kGroupBlock, rollouts_.size(), threads_,
               [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
                 Moments pooled;
                 for (std::int64_t g = begin; g < end; ++g) {
                   pooled = merge(pooled, moments_of(g));
                 }
                 blocks[at(block)] = pooled;
               });
    for (const Moments& block : blocks) {
      batch = merge(batch, block);
    }
    return batch;
  }

  // What judges the rollouts of group g, whose statistics are written on the way.
  template <class GroupJudge>
  [[nodiscard]] GroupJudge judge_of(std::int64_t g, const Moments& moments, const Moments& batch) const {
    const double prior = prior_.empty() ? std::numeric_limits<double>::quiet_NaN() : prior_[at(g)];
    const bool wants_statistics = !statistics_.count.empty();
    const typename GroupJudge::Kind group(moments, prior, rule_, wants_statistics || !rule_.leave_one_out);
    if (wants_statistics) {
      write_statistics(statistics_, at(g), group, rule_);
    }
    return GroupJudge(group, rule_, divisor_of(rule_.scale == Scale::kBatch ? batch : moments, rule_));
  }

  const Rollouts<Real>& rollouts_;
  const Groups& groups_;
  std::span<const double> prior_;
  const AdvantageRule& rule_;
  std::span<Out> advantages_;
  const StatisticsOut& statistics_;
  std::vector<std::uint8_t> is_first_;  // the rows that count in the statistics; empty: all usable ones
  bool all_usable_;
  int threads_;
};

}  // namespace

template <class Real, class Out>
void compute_advantages(const Rollouts<Real>& rollouts, const Groups& groups, std::span<const double> prior,
                        const AdvantageRule& rule, std::span<Out> advantages, const StatisticsOut& statistics,
                        int threads) {
  if (groups.offsets.empty()) {
    check_ids(groups.ids, groups.count);
  }
  if (rule.bounded()) {
    check_prior(prior, rule);
  }
  const bool all_finite = check_rewards(rollouts, rule);
  const bool all_usable = rollouts.valid.empty() && all_finite;
  const Advantages<Real, Out> of_batch(rollouts, groups, prior, rule, advantages, statistics, all_usable, threads);
  if (rule.baseline == Baseline::kCalibrated) {
    rule.leave_one_out ? of_batch.template compute<CalibratedLeaveOneOutJudge>()
                       : of_batch.template compute<Judge<CalibratedGroup>>();
  } else {
    rule.leave_one_out ? of_batch.template compute<LeaveOneOutJudge>() : of_batch.template compute<Judge<Group>>();
  }
  if (!all_finite && !statistics.nonfinite.empty()) {
    for_rows(rollouts.rewards.size(), groups, [&](std::size_t row, std::size_t group) {
      statistics.nonfinite[group] += rollouts.is_valid(row) && !rollouts.is_usable(row) ? 1.0 : 0.0;
    });
  }
}

namespace {

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

template <class Mask>
bool is_flag(Mask value) {
  return value == Mask{0} || value == Mask{1};
}

// Returns whether the mask holds nothing but 0 and 1.
template <class Out, class Mask>
V05_MULTIVERSION bool spread_row(Out advantage, const Mask* mask, std::size_t tokens, Out* out) {
  if constexpr (std::is_integral_v<Mask>) {
    using Bits = std::make_unsigned_t<Mask>;
    Bits bits = 0;  // of all values
    for (std::size_t t = 0; t < tokens; ++t) {
      out[t] = mask[t] != Mask{0} ? advantage : Out{0};
      bits |= static_cast<Bits>(mask[t]);
    }
    return is_flag(bits);
  } else {
    unsigned odd = 0;
    for (std::size_t t = 0; t < tokens; ++t) {
      const unsigned one = mask[t] == Mask{1};
      out[t] = one != 0 ? advantage : Out{0};
      odd |= (one | static_cast<unsigned>(mask[t] == Mask{0})) ^ 1U;
    }
    return odd == 0;
  }
}

// From the first cache line that is its own on, so that no vector is written to two: packed rows start anywhere.
template <class Out>
V05_MULTIVERSION void fill_row(Out advantage, std::size_t tokens, Out* out) {
  constexpr std::size_t kLine = 64 / sizeof(Out);
  const std::size_t past_line = reinterpret_cast<std::uintptr_t>(out) / sizeof(Out) % kLine;
  const std::size_t head = std::min(tokens, (kLine - past_line) % kLine);
  std::size_t t = 0;
  for (; t < head; ++t) {
    out[t] = advantage;
  }
  for (; t < tokens; ++t) {
    out[t] = advantage;
  }
}

template <class Body>
void for_token_rows(std::size_t rows, std::size_t tokens, int threads, const Body& body) {
  for_blocks(static_cast<std::int64_t>(rows), kTokenRowBlock, static_cast<std::int64_t>(tokens), threads,
             [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
               for (std::int64_t row = begin; row < end; ++row) {
                 body(at(row));
               }
             });
}

}  // namespace

template <class Reward, class Mask>
void sum_tokens(std::span<const Reward> rewards, const Mask* mask, std::span<double> sums, int threads) {
  const std::size_t tokens = sums.empty() ? 0 : rewards.size() / sums.size();
  for_token_rows(sums.size(), rewards.size(), threads, [&](std::size_t row) {
    sums[row] = sum_row(rewards.data() + row * tokens, mask + row * tokens, tokens);
  });
}

template <class Mask>
void check_mask(std::span<const Mask> mask, std::size_t rows) {
  const std::size_t tokens = rows == 0 ? 0 : mask.size() / rows;
  Offenders odd;
  for (std::size_t row = 0; row < rows; ++row) {
    const auto of_row = mask.subspan(row * tokens, tokens);
    if (const auto first = std::ranges::find_if_not(of_row, is_flag<Mask>); first != of_row.end()) {
      odd.add(row, static_cast<double>(*first));
    }
  }
  if (odd.any()) {
    odd.raise("response_mask: neither 0 nor 1 in rows", "Give bool, True for a token to train on, as labels != -100.");
  }
}

template <class Out, class Mask>
void spread_padded(std::span<const Out> advantages, const Mask* mask, std::span<Out> out, int threads) {
  const std::size_t tokens = advantages.empty() ? 0 : out.size() / advantages.size();
  std::atomic<bool> all_flags = true;
  for_token_rows(advantages.size(), out.size(), threads, [&](std::size_t row) {
    if (!spread_row(advantages[row], mask + row * tokens, tokens, out.data() + row * tokens)) {
      all_flags.store(false, std::memory_order_relaxed);
    }
  });
  if (!all_flags) {
    check_mask(std::span(mask, out.size()), advantages.size());
  }
}

template <class Out>
void spread_packed(std::span<const Out> advantages, std::span<const std::int64_t> starts, std::span<Out> out,
                   int threads) {
  for_token_rows(advantages.size(), out.size(), threads, [&](std::size_t row) {
    const Part own = part_of(starts, row, out.size());
    fill_row(advantages[row], std::max(own.begin, own.end) - own.begin, out.data() + own.begin);
  });
}

// clang-format off
#define V05_FOR_REWARDS(Real, Out)                                                                           \
  template void compute_advantages<Real, Out>(const Rollouts<Real>&, const Groups&, std::span<const double>, \
                                              const AdvantageRule&, std::span<Out>, const StatisticsOut&, int);
V05_FOR_REWARDS(float, float)
V05_FOR_REWARDS(float, double)
V05_FOR_REWARDS(double, float)
V05_FOR_REWARDS(double, double)
#undef V05_FOR_REWARDS
#define V05_FOR_MASK(Mask)                                                                                 \
  template void check_mask<Mask>(std::span<const Mask>, std::size_t);                                      \
  template void sum_tokens<float, Mask>(std::span<const float>, const Mask*, std::span<double>, int);      \
  template void sum_tokens<double, Mask>(std::span<const double>, const Mask*, std::span<double>, int);    \
  template void spread_padded<float, Mask>(std::span<const float>, const Mask*, std::span<float>, int);    \
  template void spread_padded<double, Mask>(std::span<const double>, const Mask*, std::span<double>, int);
V05_FOR_MASK(std::uint8_t)
V05_FOR_MASK(std::int32_t)
V05_FOR_MASK(std::int64_t)
V05_FOR_MASK(float)
V05_FOR_MASK(double)
#undef V05_FOR_MASK
template void spread_packed<float>(std::span<const float>, std::span<const std::int64_t>, std::span<float>, int);
template void spread_packed<double>(std::span<const double>, std::span<const std::int64_t>, std::span<double>, int);
// clang-format on

}  // namespace v05
