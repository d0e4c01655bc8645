#include "v05/allocator.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "v05/fusion.hpp"
#include "v05/statistics.hpp"
#include "v05/stopping.hpp"

namespace v05 {
namespace {

// A rollout without a reward yet holds an infinity, which no reward range admits: its state costs no memory of its own.
constexpr double kQueued = std::numeric_limits<double>::infinity();
constexpr double kLeased = -kQueued;
constexpr double kInvalid = std::numeric_limits<double>::quiet_NaN();

// Keeps lease numbers within 63 bits for the first two billion groups.
constexpr std::int64_t kLargestCount = 65535;

constexpr auto kRules = std::to_array<std::pair<std::string_view, BudgetRule>>({
    {"osla", BudgetRule::kOsla},
    {"uniform", BudgetRule::kUniform},
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
  std::vector<std::int64_t> rows;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < options.lowest_reward || values[i] > options.highest_reward) {
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
  if (taken_rows.empty()) {
    return;
  }
  for (std::size_t i = taken_rows.size(); i < added.size(); ++i) {
    ids.release(ids.size() - 1);
    ids.pop_back();
  }
  refuse("group_ids repeat an id, or name a group that is not drained yet, in ", row_list(taken_rows),
         " (the first is ", added[static_cast<std::size_t>(taken_rows.front())],
         "); an id can be used again once its group was drained");
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
      cost_(
          options.cost.value_or(1.0 / (static_cast<double>(options.maximum) * static_cast<double>(options.maximum)))) {
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
  if (!(cost_ >= 0.0) || std::isinf(cost_)) {
    refuse("cost=", cost_, " is not a finite number >= 0; use None for 1 / maximum^2");
  }
  const double width = options.highest_reward - options.lowest_reward;
  if (!(width > 0.0) || std::isinf(width)) {
    refuse("reward_range=(", options.lowest_reward, ", ", options.highest_reward,
           ") is not a finite range; give (lowest, highest) with lowest < highest");
  }
  if (options.max_attempts < 1 || options.max_attempts > kLargestCount) {
    refuse("max_attempts=", options.max_attempts, " is not between 1 and ", kLargestCount,
           "; use 1 to give a rollout up at its first failure");
  }
}

void RolloutAllocator::open(const GroupIdList& ids, std::span<const double> priors) {
  const auto groups = std::visit([](const auto& rows) { return rows.size(); }, ids);
  if (groups != priors.size()) {
    refuse("group_ids has ", groups, " rows and priors ", priors.size(), "; give one prior per group, NaN for none");
  }
  if (groups == 0) {
    return;
  }
  require_in_range("priors", priors, options_);

  const std::scoped_lock lock(mutex_);
  std::visit(
      [this]<class Id>(const std::vector<Id>& rows) {
        if (opened_ == 0) {
          ids_.emplace<GroupIds<Id>>();
        }
        auto* kept = std::get_if<GroupIds<Id>>(&ids_);
        if (kept == nullptr) {
          refuse("group_ids mix integers and strings; an allocator keeps to the kind it was first given");
        }
        append(*kept, rows);
      },
      ids);
  const auto initial = static_cast<std::size_t>(options_.initial);
  for (const double prior : priors) {
    groups_.push_back({
        .rewards = std::vector<double>(initial, kQueued),
        .prior = prior,
        .settled = 0,
    });
  }
  opened_ += static_cast<std::int64_t>(groups);
  counts_.open_groups += static_cast<std::int64_t>(groups);
}

Leases RolloutAllocator::lease(std::int64_t limit) {
  if (limit < 0) {
    refuse("n=", limit, " is negative; ask for 0 or more rollouts");
  }
  const std::scoped_lock lock(mutex_);
  const std::int64_t count = std::min(limit, queued());
  const auto size = static_cast<std::size_t>(count);
  Leases leases;
  leases.lease_ids.reserve(size);
  leases.indices.reserve(size);
  std::vector<std::int64_t> serials;
  serials.reserve(size);
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t rollout = 0;
    if (!extra_.empty()) {
      rollout = extra_.front();
      extra_.pop_front();
    } else {
      rollout = (initial_leased_ / options_.initial * options_.maximum) + (initial_leased_ % options_.initial);
      ++initial_leased_;
    }
    reward_of(rollout) = kLeased;
    leases.lease_ids.push_back((rollout * options_.max_attempts) + failures_of(rollout));
    leases.indices.push_back(rollout % options_.maximum);
    serials.push_back(rollout / options_.maximum);
  }
  counts_.leased += count;
  leases.groups = ids_of(serials);
  leases.seeds.reserve(size);
  std::visit(
      [&](const auto& ids) {
        for (std::size_t i = 0; i < size; ++i) {
          leases.seeds.push_back(rollout_seed(options_.seed, key_of(ids[i]), leases.indices[i]));
        }
      },
      leases.groups);
  return leases;
}

void RolloutAllocator::report(std::span<const std::int64_t> lease_ids, std::span<const double> rewards) {
  if (lease_ids.size() != rewards.size()) {
    refuse("lease_ids has ", lease_ids.size(), " rows and rewards ", rewards.size(), "; give one reward per lease");
  }
  require_in_range("rewards", rewards, options_);
  const std::scoped_lock lock(mutex_);
  for (std::size_t i = 0; i < lease_ids.size(); ++i) {
    if (const auto rollout = find_leased(lease_ids[i])) {
      ++counts_.reported;
      settle(*rollout, rewards[i]);
    }
  }
}

void RolloutAllocator::fail(std::span<const std::int64_t> lease_ids) {
  const std::scoped_lock lock(mutex_);
  for (const std::int64_t lease_id : lease_ids) {
    const auto rollout = find_leased(lease_id);
    if (!rollout) {
      continue;
    }
    ++counts_.failed;
    if (++failures_[*rollout] == options_.max_attempts) {
      settle(*rollout, kInvalid);
    } else {
      --counts_.leased;
      reward_of(*rollout) = kQueued;
      extra_.push_back(*rollout);
    }
  }
}

bool RolloutAllocator::done() const {
  const std::scoped_lock lock(mutex_);
  return counts_.open_groups == 0;
}

AllocatorCounts RolloutAllocator::counts() const {
  const std::scoped_lock lock(mutex_);
  AllocatorCounts counts = counts_;
  counts.queued = queued();
  return counts;
}

ClosedGroups RolloutAllocator::drain() {
  const std::scoped_lock lock(mutex_);
  std::ranges::sort(closed_);
  ClosedGroups drained;
  drained.group_ids = ids_of(closed_);
  drained.offsets.reserve(closed_.size() + 1);
  drained.offsets.push_back(0);
  drained.priors.reserve(closed_.size());
  for (const std::int64_t serial : closed_) {
    const Group& group = groups_[slot_of(serial)];
    drained.rewards.insert(drained.rewards.end(), group.rewards.begin(), group.rewards.end());
    drained.offsets.push_back(static_cast<std::int64_t>(drained.rewards.size()));
    drained.priors.push_back(group.prior);
    forget(serial);
  }
  closed_.clear();
  counts_.closed_groups = 0;
  std::visit(
      [this](auto& ids) {
        while (!groups_.empty() && groups_.front().rewards.empty()) {
          groups_.pop_front();
          ids.pop_front();
        }
      },
      ids_);
  return drained;
}

std::size_t RolloutAllocator::slot_of(std::int64_t serial) const {
  return groups_.size() - static_cast<std::size_t>(opened_ - serial);
}

double& RolloutAllocator::reward_of(std::int64_t rollout) {
  return groups_[slot_of(rollout / options_.maximum)].rewards[static_cast<std::size_t>(rollout % options_.maximum)];
}

std::int64_t RolloutAllocator::failures_of(std::int64_t rollout) const {
  const auto found = failures_.find(rollout);
  return found == failures_.end() ? 0 : found->second;
}

std::int64_t RolloutAllocator::queued() const {
  return static_cast<std::int64_t>(extra_.size()) + (opened_ * options_.initial) - initial_leased_;
}

GroupIdList RolloutAllocator::ids_of(std::span<const std::int64_t> serials) const {
  return std::visit(
      [&]<class Id>(const GroupIds<Id>& kept) -> GroupIdList {
        std::vector<Id> ids;
        ids.reserve(serials.size());
        for (const std::int64_t serial : serials) {
          ids.push_back(kept[slot_of(serial)]);
        }
        return ids;
      },
      ids_);
}

// The rollout of a lease that is out. Any other id is counted under what it is.
std::optional<std::int64_t> RolloutAllocator::find_leased(std::int64_t lease_id) {
  const std::int64_t rollout = lease_id / options_.max_attempts;
  const std::int64_t attempt = lease_id % options_.max_attempts;
  const std::int64_t serial = rollout / options_.maximum;
  const auto count_as = [](std::int64_t& counter) {
    ++counter;
    return std::nullopt;
  };
  if (lease_id < 0 || serial >= opened_) {
    return count_as(counts_.unknown);
  }
  const bool left_the_window = opened_ - serial > static_cast<std::int64_t>(groups_.size());
  if (left_the_window || groups_[slot_of(serial)].rewards.empty()) {
    return count_as(counts_.late);
  }
  if (std::cmp_greater_equal(rollout % options_.maximum, groups_[slot_of(serial)].rewards.size())) {
    return count_as(counts_.unknown);
  }
  const std::int64_t failures = failures_of(rollout);
  if (attempt < failures) {
    return count_as(counts_.late);
  }
  const double reward = reward_of(rollout);
  if (attempt > failures || reward == kQueued) {
    return count_as(counts_.unknown);
  }
  if (reward != kLeased) {
    return count_as(counts_.duplicate);
  }
  return rollout;
}

void RolloutAllocator::settle(std::int64_t rollout, double reward) {
  const std::int64_t serial = rollout / options_.maximum;
  Group& group = groups_[slot_of(serial)];
  group.rewards[static_cast<std::size_t>(rollout % options_.maximum)] = reward;
  --counts_.leased;
  counts_.invalid += std::isnan(reward) ? 1 : 0;
  if (std::cmp_less(++group.settled, group.rewards.size())) {
    return;
  }
  if (takes_more(group)) {
    ask_more(serial, group);
    return;
  }
  closed_.push_back(serial);
  --counts_.open_groups;
  ++counts_.closed_groups;
}

bool RolloutAllocator::takes_more(const Group& group) {
  if (options_.rule == BudgetRule::kUniform || std::cmp_equal(group.rewards.size(), options_.maximum)) {
    return false;
  }
  valid_.clear();
  std::ranges::copy_if(group.rewards, std::back_inserter(valid_), [](double reward) { return !std::isnan(reward); });
  const Moments sample = moments(valid_);
  const double half_range = (options_.highest_reward - options_.lowest_reward) / 2.0;
  const double squared_bias = shrinkage(sample.count, sample.mean, group.prior, half_range).squared_bias;
  return osla_take_more(sample.count, squared_bias, options_.maximum, cost_);
}

void RolloutAllocator::ask_more(std::int64_t serial, Group& group) {
  const auto asked = static_cast<std::int64_t>(group.rewards.size());
  const std::int64_t wanted = asked + std::min(options_.chunk, options_.maximum - asked);
  group.rewards.reserve(
      static_cast<std::size_t>(wanted));  // not a slot more: most groups stop before the next doubling
  group.rewards.resize(static_cast<std::size_t>(wanted), kQueued);
  for (std::int64_t index = asked; index < wanted; ++index) {
    extra_.push_back((serial * options_.maximum) + index);
  }
}

void RolloutAllocator::forget(std::int64_t serial) {
  const std::size_t slot = slot_of(serial);
  Group& group = groups_[slot];
  for (std::size_t index = 0; index < group.rewards.size() && !failures_.empty(); ++index) {
    failures_.erase((serial * options_.maximum) + static_cast<std::int64_t>(index));
  }
  group = {};
  std::visit([slot](auto& ids) { ids.release(slot); }, ids_);
}

}  // namespace v05
