// Handing out leases, and settling their rollouts.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "checks.hpp"
#include "room.hpp"
#include "v05/allocator.hpp"
#include "v05/group_ids.hpp"

namespace v05 {
namespace {

// How many rows of a batch ahead to prefetch. States are found through their group, so the group is prefetched first.
constexpr std::size_t kStatesAhead = 24;
constexpr std::size_t kGroupsAhead = 2 * kStatesAhead;

// Depends only on the rollout, not on when it runs. It has 63 bits because torch generators take a non-negative int64.
std::int64_t rollout_seed(std::int64_t seed, std::uint64_t key, std::int64_t index) {
  const std::uint64_t group = mix(mix(static_cast<std::uint64_t>(seed)) ^ key);
  return static_cast<std::int64_t>(mix(group ^ static_cast<std::uint64_t>(index)) >> 1U);
}

}  // namespace

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
      // These rollouts are the last of the queue, because the group had none queued before.
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
  if (2 * extra_leased_ >= extra_.size()) {  // so rarely that moving costs less than queueing did
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
    // The groups of a batch are scattered in memory. Prefetch those of later rows while this one is applied.
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

// The time of a lease is only in the state of its rollout, so this checks every group that is not drained, until no
// lease is left.
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

std::int64_t RolloutAllocator::failures_of(std::int64_t rollout) const {
  if (failures_.empty()) {
    return 0;
  }
  const auto found = failures_.find(rollout);
  return found == failures_.end() ? 0 : found->second;
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

// The rollout of a lease that is out. Any other id is counted by its kind in `strays`.
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

// Allocates memory for the failures of these rollouts.
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

}  // namespace v05
