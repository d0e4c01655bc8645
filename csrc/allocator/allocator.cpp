#include "v05/allocator.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "v05/fusion.hpp"
#include "v05/moments.hpp"
#include "v05/stopping.hpp"

namespace v05 {
namespace {

// Keeps lease numbers within 63 bits for the first two billion groups.
constexpr std::int64_t kLargestCount = 65535;

// Rows of a batch between a prefetch and its use; states are found through their group, so it comes first.
constexpr std::size_t kStatesAhead = 24;
constexpr std::size_t kGroupsAhead = 2 * kStatesAhead;

constexpr auto kRules = std::to_array<std::pair<std::string_view, BudgetRule>>({
    {"osla", BudgetRule::kOsla},
    {"uniform", BudgetRule::kUniform},
    {"calibrated", BudgetRule::kCalibrated},
    {"total", BudgetRule::kTotal},
});

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::digits10);
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

std::string row_list(std::span<const std::int64_t> rows) {
  constexpr std::size_t kShown = 8;
  std::ostringstream text;
  text << (rows.size() == 1 ? "row " : "rows ");
  for (std::size_t i = 0; i < std::min(rows.size(), kShown); ++i) {
    text << (i == 0 ? "" : ", ") << rows[i];
  }
  if (rows.size() > kShown) {
    text << " and " << rows.size() - kShown << " more";
  }
  return text.str();
}

// NaN is admitted: no prior, no reward.
void require_in_range(std::string_view name, std::span<const double> values, const AllocatorOptions& options) {
  const double slack = rounding_slack(options.lowest_reward, options.highest_reward);
  std::vector<std::int64_t> rows;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < options.lowest_reward - slack || values[i] > options.highest_reward + slack) {
      rows.push_back(static_cast<std::int64_t>(i));
    }
  }
  if (!rows.empty()) {
    refuse(name, " outside reward_range=(", options.lowest_reward, ", ", options.highest_reward, ") in ",
           row_list(rows), " (the first is ", values[static_cast<std::size_t>(rows.front())],
           "); widen reward_range, or pass NaN where there is no value");
  }
}

// Depends on what the rollout is, not on when it runs. 63 bits: torch generators take a non-negative int64.
std::int64_t rollout_seed(std::int64_t seed, std::uint64_t key, std::int64_t index) {
  const std::uint64_t group = mix(mix(static_cast<std::uint64_t>(seed)) ^ key);
  return static_cast<std::int64_t>(mix(group ^ static_cast<std::uint64_t>(index)) >> 1U);
}

template <class Id>
void append(GroupIds<Id>& ids, const std::vector<Id>& added) {
  std::vector<std::int64_t> taken_rows;
  for (std::size_t i = 0; i < added.size(); ++i) {
    if (!ids.push_back(added[i])) {
      taken_rows.push_back(static_cast<std::int64_t>(i));
    }
  }
  if (!taken_rows.empty()) {
    refuse("group_ids repeat an id, or name a group that is not drained yet, in ", row_list(taken_rows),
           " (the first is ", added[static_cast<std::size_t>(taken_rows.front())],
           "); an id can be used again once its group was drained");
  }
}

// Room for more elements, which can then be added without memory.
template <class T>
void make_room(std::vector<T>& elements, std::size_t more) {
  if (elements.capacity() - elements.size() < more) {
    elements.reserve(std::max(elements.size() + more, 2 * elements.capacity()));
  }
}

void require_counts(const AllocatorOptions& options) {
  if (options.initial < 1) {
    refuse("initial=", options.initial, " is not positive; a group needs at least 1 rollout");
  }
  if (options.maximum < options.initial || options.maximum > kLargestCount) {
    refuse("maximum=", options.maximum, " is not between initial=", options.initial, " and ", kLargestCount,
           "; change maximum or initial");
  }
  if (options.chunk < 1) {
    refuse("chunk=", options.chunk, " is not positive; use 1 to add rollouts one by one");
  }
  if (options.max_attempts < 1 || options.max_attempts > kLargestCount) {
    refuse("max_attempts=", options.max_attempts, " is not between 1 and ", kLargestCount,
           "; use 1 to give a rollout up at its first failure");
  }
}

// An input that the rule does not read is a mistake of the caller's.
void require_rule_inputs(const AllocatorOptions& options) {
  const bool reads_cost = options.rule == BudgetRule::kOsla || options.rule == BudgetRule::kCalibrated;
  const bool reads_calibration = options.rule == BudgetRule::kCalibrated || options.rule == BudgetRule::kTotal;
  if (options.cost && !reads_cost) {
    refuse("cost=", *options.cost, " has no meaning for rules 'uniform' and 'total'; leave it out");
  }
  if (options.total.has_value() != (options.rule == BudgetRule::kTotal)) {
    refuse(options.total ? "total is given; only rule='total' takes it, leave it out"
                         : "total=None; rule='total' needs the number of rollouts to share out");
  }
  if (options.total && *options.total < options.initial) {
    refuse("total=", *options.total, " does not hold the initial=", options.initial, " rollouts of a group; raise it");
  }
  if (options.rule == BudgetRule::kCalibrated && !options.calibration) {
    refuse("calibration=None; rule='calibrated' needs a Calibration fitted on past groups");
  }
  if (options.calibration && !reads_calibration) {
    refuse("calibration is given; only rules 'calibrated' and 'total' read it, leave it out");
  }
  if (options.calibration && !options.calibration->within_bounds()) {
    refuse("calibration is out of bounds; see v05.methods.Calibration");
  }
}

}  // namespace

BudgetRule find_budget_rule(std::string_view name) {
  std::string known;
  for (const auto& [rule_name, rule] : kRules) {
    if (rule_name == name) {
      return rule;
    }
    known.append(known.empty() ? "" : ", ").append(rule_name);
  }
  refuse("rule='", name, "' is unknown; choose one of ", known);
}

RolloutAllocator::RolloutAllocator(const AllocatorOptions& options)
    : options_(options),
      cost_(options.cost.value_or(1.0 / (static_cast<double>(options.maximum) * static_cast<double>(options.maximum)))),
      ids_(std::make_unique<GroupIds<std::int64_t>>()) {
  require_counts(options);
  require_rule_inputs(options);
  if (!(cost_ >= 0.0) || std::isinf(cost_)) {
    refuse("cost=", cost_, " is not a finite number >= 0; use None for 1 / maximum^2");
  }
  const double width = options.highest_reward - options.lowest_reward;
  if (!(width > 0.0) || std::isinf(width)) {
    refuse("reward_range=(", options.lowest_reward, ", ", options.highest_reward,
           ") is not a finite range; give (lowest, highest) with lowest < highest");
  }
  index_bits_ = static_cast<unsigned>(std::bit_width(static_cast<std::uint64_t>(options.maximum - 1)));
  attempt_bits_ = static_cast<unsigned>(std::bit_width(static_cast<std::uint64_t>(options.max_attempts - 1)));
}

std::vector<std::int64_t> predicted_counts(std::span<const double> rates, std::int64_t total, std::int64_t lowest,
                                           std::int64_t highest) {
  const auto groups = static_cast<std::int64_t>(rates.size());
  if (lowest < 1 || highest < lowest || highest > kLargestCount) {
    refuse("lowest=", lowest, " and highest=", highest, " are not 1 <= lowest <= highest <= ", kLargestCount,
           "; the paper's are 2 and 128");
  }
  if (total < 0 || (groups > 0 && total / groups < lowest)) {  // groups * lowest may overflow
    refuse("total=", total, " does not hold lowest=", lowest, " rollouts for each of ", groups,
           " groups; raise it, or give fewer groups");
  }
  struct Next {
    double gain;
    std::int64_t group;
    bool operator<(const Next& other) const { return gain != other.gain ? gain < other.gain : group > other.group; }
  };
  std::vector<std::int64_t> counts(rates.size(), lowest);
  const auto gain_of = [&](std::int64_t group) {
    const auto g = static_cast<std::size_t>(group);
    const double rate = std::isnan(rates[g]) ? 0.5 : rates[g];
    return predicted_utility(counts[g] + 1, rate) - predicted_utility(counts[g], rate);
  };
  std::vector<Next> heap;
  for (std::int64_t group = 0; group < groups; ++group) {
    if (const double rate = rates[static_cast<std::size_t>(group)]; rate < 0.0 || rate > 1.0) {
      refuse("rates[", group, "]=", rate, " is outside [0, 1]; scale predictions, or pass NaN where there is none");
    }
    if (lowest < highest) {
      heap.push_back({.gain = gain_of(group), .group = group});
    }
  }
  std::ranges::make_heap(heap, std::less{});
  for (std::int64_t left = total - (groups * lowest); left > 0 && !heap.empty() && heap.front().gain > 0.0; --left) {
    std::ranges::pop_heap(heap, std::less{});
    const std::int64_t group = heap.back().group;
    heap.pop_back();
    if (++counts[static_cast<std::size_t>(group)] < highest) {
      heap.push_back({.gain = gain_of(group), .group = group});
      std::ranges::push_heap(heap, std::less{});
    }
  }
  return counts;
}

void RolloutAllocator::open(const GroupIdList& ids, std::span<const double> priors,
                            std::span<const std::int64_t> counts) {
  const auto groups = std::visit([](const auto& rows) { return rows.size(); }, ids);
  if (groups != priors.size()) {
    refuse("group_ids has ", groups, " rows and priors ", priors.size(), "; give one prior per group, NaN for none");
  }
  if (groups == 0) {
    return;
  }
  require_in_range("priors", priors, options_);
  if (!counts.empty() && counts.size() != groups) {
    refuse("counts has ", counts.size(), " rows and group_ids ", groups, "; give one count per group");
  }
  const std::vector<std::int64_t> asked(counts.begin(), counts.end());  // another thread may change the caller's
  for (const std::int64_t count : asked) {
    if (count < options_.initial || count > options_.maximum) {
      refuse("counts holds ", count, ", which is not between initial=", options_.initial,
             " and maximum=", options_.maximum, "; change it, initial or maximum");
    }
  }
  std::visit([&](const auto& rows) { open_groups(rows, priors, asked); }, ids);
}

template <class Id>
void RolloutAllocator::open_groups(const std::vector<Id>& rows, std::span<const double> priors,
                                   std::span<const std::int64_t> counts) {
  const auto groups = static_cast<std::int64_t>(rows.size());
  const std::scoped_lock lock(mutex_);
  const std::int64_t asked =
      counts.empty() ? groups * options_.initial : std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  const std::int64_t spent = counts_.open_groups == 0 ? 0 : spent_;
  if (const auto& total = options_.total; total && asked > *total - spent) {
    refuse("group_ids has ", groups, " rows, which take ", asked, " initial rollouts, and ", *total - spent,
           " of total=", *total, " are left; open fewer groups, or raise total");
  }
  std::unique_ptr<GroupIds<Id>> first;  // the allocator's kind of ids follows its first groups
  if (opened_ == 0) {
    first = std::make_unique<GroupIds<Id>>();
  } else if (!std::holds_alternative<std::unique_ptr<GroupIds<Id>>>(ids_)) {
    refuse("group_ids mix integers and strings; an allocator keeps to the kind it was first given");
  }
  GroupIds<Id>& kept = first ? *first : *std::get<std::unique_ptr<GroupIds<Id>>>(ids_);
  const std::size_t before = groups_.size();
  make_room(closed_, candidates_.size());
  make_room(extra_, static_cast<std::size_t>(asked - groups * options_.initial));
  try {
    append(kept, rows);
    for (std::size_t g = 0; g < rows.size(); ++g) {
      Group& group = groups_.emplace_back();
      group.prior = options_.within(priors[g]);
      group.ask(options_.initial);
      group.require_room(group.asked);
    }
  } catch (...) {
    groups_.resize(before);
    kept.shrink(before);
    throw;
  }

  if (first) {
    ids_ = std::move(first);
  }
  for (std::size_t g = 0; g < counts.size(); ++g) {
    ask_more(opened_ + static_cast<std::int64_t>(g), groups_[before + g], counts[g] - options_.initial);
  }
  opened_ += groups;
  counts_.open_groups += groups;
  if (options_.total) {
    spent_ = spent + asked;
    close_candidates_if_spent();
  }
}

Leases RolloutAllocator::lease(std::int64_t limit, std::int64_t now) {
  if (limit < 0) {
    refuse("n=", limit, " is negative; ask for 0 or more rollouts");
  }
  const std::scoped_lock lock(mutex_);
  const std::size_t extra_size = extra_.size();
  const std::size_t extra_leased = extra_leased_;
  const std::int64_t initial_leased = initial_leased_;
  Leases leases;
  std::vector<std::int64_t> serials;
  std::vector<Candidate> promoted;
  try {
    make_room(closed_, candidates_.size());
    while (std::cmp_less(serials.size(), limit)) {
      if (extra_left() == 0 && fresh() == 0 && !candidates_.empty() && total_left() > 0) {
        promote_candidate(promoted);
      }
      const auto rollout = next_rollout();
      if (!rollout) {
        break;
      }
      serials.push_back(serial_of(*rollout));
      leases.indices.push_back(index_of(*rollout));
      leases.lease_ids.push_back(join_bits(*rollout, failures_of(*rollout), attempt_bits_));
      Group& group = group_of(serials.back());
      const auto index = static_cast<std::size_t>(leases.indices.back());
      group.require_room(index + 1);
      group.states[index] = RolloutState::leased(now);
    }
    leases.groups = ids_of(serials);
    leases.seeds.reserve(serials.size());
    std::visit(
        [&](const auto& ids) {
          for (std::size_t i = 0; i < ids.size(); ++i) {
            leases.seeds.push_back(rollout_seed(options_.seed, key_of(ids[i]), leases.indices[i]));
          }
        },
        leases.groups);
  } catch (...) {
    for (std::size_t i = 0; i < leases.lease_ids.size(); ++i) {
      Group& group = group_of(serials[i]);
      if (std::cmp_less(leases.indices[i], group.room)) {
        group.states[static_cast<std::size_t>(leases.indices[i])] = RolloutState();
      }
    }
    for (; !promoted.empty(); promoted.pop_back()) {
      // The group was asked for these rollouts and had none queued before: they are the queue's last.
      Group& group = group_of(promoted.back().serial);
      while (extra_.size() > extra_size && serial_of(extra_.back()) == promoted.back().serial) {
        extra_.pop_back();
        group.ask(-1);
        --spent_;
      }
      candidates_.push_back(promoted.back());
      std::ranges::push_heap(candidates_, std::less{});
    }
    extra_leased_ = extra_leased;
    initial_leased_ = initial_leased;
    throw;
  }
  counts_.leased += static_cast<std::int64_t>(serials.size());
  close_candidates_if_spent();
  if (2 * extra_leased_ >= extra_.size()) {  // seldom enough that what is moved costs less than what was queued
    extra_.erase(extra_.begin(), extra_.begin() + static_cast<std::ptrdiff_t>(extra_leased_));
    extra_leased_ = 0;
  }
  return leases;
}

void RolloutAllocator::report(std::span<const std::int64_t> lease_ids, std::span<const double> rewards) {
  if (lease_ids.size() != rewards.size()) {
    refuse("lease_ids has ", lease_ids.size(), " rows and rewards ", rewards.size(), "; give one reward per lease");
  }
  require_in_range("rewards", rewards, options_);
  const std::scoped_lock lock(mutex_);
  prepare_decisions(lease_ids.size(), 0);
  for (std::size_t i = 0; i < lease_ids.size(); ++i) {
    // The groups of a batch lie all over memory: ask for those of later rows while this one is applied.
    if (i + kGroupsAhead < lease_ids.size()) {
      prefetch_group(lease_ids[i + kGroupsAhead]);
    }
    if (i + kStatesAhead < lease_ids.size()) {
      prefetch_states(lease_ids[i + kStatesAhead]);
    }
    if (const auto rollout = find_leased(lease_ids[i], counts_)) {
      ++counts_.reported;
      settle(*rollout, options_.within(rewards[i]));
    }
  }
}

void RolloutAllocator::fail(std::span<const std::int64_t> lease_ids) {
  const std::scoped_lock lock(mutex_);
  std::vector<std::int64_t> leased;
  for (const std::int64_t lease_id : lease_ids) {
    AllocatorCounts ignored;
    if (const auto rollout = find_leased(lease_id, ignored)) {
      leased.push_back(*rollout);
    }
  }
  prepare_failures(leased);
  for (const std::int64_t lease_id : lease_ids) {
    if (const auto rollout = find_leased(lease_id, counts_)) {
      ++counts_.failed;
      give_up(*rollout);
    }
  }
}

// Leases hold their time themselves, so this looks at every group that is not drained, until no lease is left.
std::int64_t RolloutAllocator::expire(double older_than, std::int64_t now) {
  if (!(older_than >= 0.0)) {
    refuse("older_than=", older_than, " is not a number of seconds >= 0; use 0 to take every lease back");
  }
  const std::scoped_lock lock(mutex_);
  const double latest = static_cast<double>(now) - (older_than * 1e6);
  std::int64_t left = counts_.leased;
  std::vector<std::int64_t> expired;
  for (std::int64_t serial = first_serial_; serial < opened_ && left > 0; ++serial) {
    const Group& group = group_of(serial);
    for (std::size_t index = 0; group.settled < group.asked && index < group.asked; ++index) {
      const RolloutState state = group.state(index);
      left -= state.is_leased() ? 1 : 0;
      if (state.is_leased() && static_cast<double>(state.since()) <= latest) {
        expired.push_back(rollout_of(serial, static_cast<std::int64_t>(index)));
      }
    }
  }
  prepare_failures(expired);
  for (const std::int64_t rollout : expired) {
    give_up(rollout);
  }
  counts_.expired += std::ssize(expired);
  return std::ssize(expired);
}

bool RolloutAllocator::done() const {
  const std::scoped_lock lock(mutex_);
  return counts_.open_groups == 0;
}

AllocatorCounts RolloutAllocator::counts() const {
  const std::scoped_lock lock(mutex_);
  AllocatorCounts counts = counts_;
  counts.queued = static_cast<std::int64_t>(extra_left()) + fresh();
  return counts;
}

ClosedGroups RolloutAllocator::drain(const std::function<void(const ClosedGroups&)>& hand_over) {
  const std::scoped_lock lock(mutex_);
  std::ranges::sort(closed_);
  ClosedGroups drained;
  drained.group_ids = ids_of(closed_);
  drained.offsets.reserve(closed_.size() + 1);
  drained.offsets.push_back(0);
  drained.priors.reserve(closed_.size());
  for (const std::int64_t serial : closed_) {
    const Group& group = group_of(serial);
    for (const RolloutState state : group.rollouts()) {
      drained.rewards.push_back(state.reward());
    }
    drained.offsets.push_back(static_cast<std::int64_t>(drained.rewards.size()));
    drained.priors.push_back(group.prior);
  }
  if (hand_over) {
    hand_over(drained);
  }

  for (const std::int64_t serial : closed_) {
    forget(serial);
  }
  closed_.clear();
  counts_.closed_groups = 0;
  std::visit(
      [this](auto& ids) {
        while (!groups_.empty() && groups_.front().asked == 0) {
          groups_.pop_front();
          ++first_serial_;
          ids->pop_front();
        }
      },
      ids_);
  return drained;
}

std::int64_t RolloutAllocator::failures_of(std::int64_t rollout) const {
  if (failures_.empty()) {
    return 0;
  }
  const auto found = failures_.find(rollout);
  return found == failures_.end() ? 0 : found->second;
}

GroupIdList RolloutAllocator::ids_of(std::span<const std::int64_t> serials) const {
  return std::visit(
      [&]<class Id>(const std::unique_ptr<GroupIds<Id>>& kept) -> GroupIdList {
        std::vector<Id> ids;
        ids.reserve(serials.size());
        for (const std::int64_t serial : serials) {
          ids.push_back((*kept)[slot_of(serial)]);
        }
        return ids;
      },
      ids_);
}

void RolloutAllocator::prefetch_group(std::int64_t lease_id) const {
  const std::int64_t serial = serial_of(high_bits(lease_id, attempt_bits_));
  if (in_window(serial)) {
    __builtin_prefetch(&groups_[slot_of(serial)]);
  }
}

void RolloutAllocator::prefetch_states(std::int64_t lease_id) const {
  const std::int64_t rollout = high_bits(lease_id, attempt_bits_);
  if (!holds(rollout)) {
    return;
  }
  const Group& group = groups_[slot_of(serial_of(rollout))];
  if (const std::int64_t index = index_of(rollout); std::cmp_less(index, group.room)) {
    __builtin_prefetch(&group.states[static_cast<std::size_t>(index)]);
  }
}

// The rollout of a lease that is out. Any other id is counted, under what it is, in `strays`.
std::optional<std::int64_t> RolloutAllocator::find_leased(std::int64_t lease_id, AllocatorCounts& strays) const {
  const std::int64_t rollout = high_bits(lease_id, attempt_bits_);
  const std::int64_t attempt = low_bits(lease_id, attempt_bits_);
  const std::int64_t serial = serial_of(rollout);
  const auto count_as = [](std::int64_t& counter) {
    ++counter;
    return std::nullopt;
  };
  if (lease_id < 0 || serial >= opened_ || attempt >= options_.max_attempts) {
    return count_as(strays.unknown);
  }
  if (serial < first_serial_) {
    return count_as(strays.late);
  }
  const Group& group = groups_[slot_of(serial)];
  if (group.asked == 0) {
    return count_as(strays.late);
  }
  if (index_of(rollout) >= group.asked) {
    return count_as(strays.unknown);
  }
  const std::int64_t failures = failures_of(rollout);
  if (attempt < failures) {
    return count_as(strays.late);
  }
  const RolloutState state = group.state(static_cast<std::size_t>(index_of(rollout)));
  if (attempt > failures || state.is_queued()) {
    return count_as(strays.unknown);
  }
  if (state.is_settled()) {
    return count_as(strays.duplicate);
  }
  return rollout;
}

// Gives rollouts of the total to the group where the gain is largest. `promoted` says who was a candidate.
void RolloutAllocator::promote_candidate(std::vector<Candidate>& promoted) {
  const Candidate chosen = candidates_.front();
  Group& group = group_of(chosen.serial);
  const std::int64_t more = std::min({options_.chunk, options_.maximum - group.asked, total_left()});
  make_room(extra_, static_cast<std::size_t>(more));
  promoted.push_back(chosen);

  std::ranges::pop_heap(candidates_, std::less{});
  candidates_.pop_back();
  if (!candidates_.empty()) {  // most likely the next, and far away in memory
    __builtin_prefetch(&group_of(candidates_.front().serial));
  }
  spent_ += more;
  ask_more(chosen.serial, group, more);
}

// Room for the decisions on the groups of rollouts that are about to settle, and for those that are queued again.
void RolloutAllocator::prepare_decisions(std::size_t settled, std::size_t retried) {
  const std::size_t groups = std::min(settled, static_cast<std::size_t>(counts_.open_groups));  // each is decided once
  const bool asks = options_.rule == BudgetRule::kOsla || options_.rule == BudgetRule::kCalibrated;
  make_room(closed_, groups);
  make_room(candidates_, options_.rule == BudgetRule::kTotal ? groups : 0);
  make_room(extra_,
            retried + (asks ? groups * static_cast<std::size_t>(std::min(options_.chunk, options_.maximum)) : 0));
}

// Room for the rollouts to fail.
void RolloutAllocator::prepare_failures(std::span<const std::int64_t> rollouts) {
  prepare_decisions(rollouts.size(), rollouts.size());
  try {
    for (const std::int64_t rollout : rollouts) {
      failures_.try_emplace(rollout, 0);
    }
  } catch (...) {
    for (const std::int64_t rollout : rollouts) {
      if (const auto found = failures_.find(rollout); found != failures_.end() && found->second == 0) {
        failures_.erase(found);
      }
    }
    throw;
  }
}

std::optional<std::int64_t> RolloutAllocator::next_rollout() {
  if (extra_left() > 0) {
    return extra_[extra_leased_++];
  }
  if (fresh() > 0) {
    const std::int64_t serial = initial_leased_ / options_.initial;
    const std::int64_t index = initial_leased_ % options_.initial;
    ++initial_leased_;
    return rollout_of(serial, index);
  }
  return std::nullopt;
}

void RolloutAllocator::settle(std::int64_t rollout, double reward) {
  const std::int64_t serial = serial_of(rollout);
  Group& group = group_of(serial);
  group.states[static_cast<std::size_t>(index_of(rollout))] = RolloutState::settled(reward);
  --counts_.leased;
  counts_.invalid += std::isnan(reward) ? 1 : 0;
  if (++group.settled == group.asked) {
    decide(serial, group);
  }
}

void RolloutAllocator::give_up(std::int64_t rollout) {
  if (++failures_[rollout] == options_.max_attempts) {
    settle(rollout, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  --counts_.leased;
  state_of(rollout) = RolloutState();
  extra_.push_back(rollout);
}

// All rollouts of the group that were asked for have settled.
void RolloutAllocator::decide(std::int64_t serial, Group& group) {
  const std::int64_t room = options_.maximum - group.asked;
  const bool shares = options_.rule == BudgetRule::kTotal;
  if (room == 0 || options_.rule == BudgetRule::kUniform || (shares && total_left() == 0)) {
    close(serial);
    return;
  }
  const double gain = gain_of(group);
  if (shares) {
    candidates_.push_back({.gain = gain, .serial = serial});
    std::ranges::push_heap(candidates_, std::less{});
  } else if (gain > cost_) {
    ask_more(serial, group, std::min(options_.chunk, room));
  } else {
    close(serial);
  }
}

// By how much one more rollout would shrink the error of the group's baseline, centred units.
double RolloutAllocator::gain_of(const Group& group) const {
  const double width = options_.highest_reward - options_.lowest_reward;
  const auto scaled = [&](double reward) { return (reward - options_.lowest_reward) / width; };
  const auto for_valid = [&](const auto& body) {
    for (const RolloutState state : group.rollouts()) {
      if (!std::isnan(state.reward())) {
        body(state.reward());
      }
    }
  };
  if (options_.calibration) {
    std::int64_t count = 0;
    double successes = 0.0;
    for_valid([&](double reward) {
      ++count;
      successes += scaled(reward);
    });
    return calibrated_gain(calibrated(count, successes, believe(scaled(group.prior), *options_.calibration)));
  }
  MomentsAccumulator valid;
  for_valid([&](double reward) { valid.add(reward); });
  const Moments sample = valid.moments();
  return osla_gain(sample.count, shrinkage(sample.count, sample.mean, group.prior, width / 2.0).squared_bias);
}

void RolloutAllocator::ask_more(std::int64_t serial, Group& group, std::int64_t more) {
  for (std::int64_t index = group.asked; index < group.asked + more; ++index) {
    extra_.push_back(rollout_of(serial, index));
  }
  group.ask(more);
  static_cast<void>(
      group.make_room(group.asked));  // while it is in the cache; if there is no memory, the lease needs it
}

bool RolloutAllocator::Group::grow(std::size_t rollouts) {
  const std::size_t larger = (rollouts + 3) / 4 * 4;
  std::unique_ptr<RolloutState[]> moved(new (std::nothrow) RolloutState[larger]);  // NOLINT(modernize-avoid-c-arrays)
  if (moved == nullptr) {
    return false;
  }
  std::copy_n(states.get(), room, moved.get());
  states = std::move(moved);
  room = static_cast<std::uint32_t>(larger);
  return true;
}

void RolloutAllocator::close(std::int64_t serial) {
  closed_.push_back(serial);
  --counts_.open_groups;
  ++counts_.closed_groups;
}

void RolloutAllocator::close_candidates_if_spent() {
  if (total_left() > 0) {
    return;
  }
  for (const Candidate& candidate : candidates_) {
    close(candidate.serial);
  }
  candidates_.clear();
}

void RolloutAllocator::forget(std::int64_t serial) {
  const std::size_t slot = slot_of(serial);
  Group& group = groups_[slot];
  for (std::size_t index = 0; index < group.asked && !failures_.empty(); ++index) {
    failures_.erase(rollout_of(serial, static_cast<std::int64_t>(index)));
  }
  group = {};
  std::visit([slot](auto& ids) { ids->release(slot); }, ids_);
}

}  // namespace v05
