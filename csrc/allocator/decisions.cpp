// The decisions on a group whose rollouts have all settled: more rollouts, a wait for a share of the total, or its end.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "room.hpp"
#include "v05/allocator.hpp"
#include "v05/fusion.hpp"
#include "v05/moments.hpp"
#include "v05/stopping.hpp"

namespace v05 {

// Room for the decisions on the groups of rollouts that are about to settle, and for those that are queued again.
void RolloutAllocator::prepare_decisions(std::size_t settled, std::size_t retried) {
  const std::size_t groups = std::min(settled, static_cast<std::size_t>(counts_.open_groups));  // each is decided once
  make_room(closed_, groups);
  make_room(candidates_, options_.rule == BudgetRule::kTotal ? groups : 0);
  make_room(extra_, retried + (is_sequential(options_.rule)
                                   ? groups * static_cast<std::size_t>(std::min(options_.chunk, options_.maximum))
                                   : 0));
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

// By how much one more rollout would shrink the error of the group's baseline or, where energies are known, the
// variance of its gradient; centred units.
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
    const CalibratedFusion fusion = calibrated(count, successes, believe(scaled(group.prior), *options_.calibration));
    const bool of_gradient = options_.rule == BudgetRule::kVariance ||
                             (options_.rule == BudgetRule::kTotal && options_.calibration->knows_energies());
    return of_gradient ? variance_gain(count, fusion, *options_.calibration) : calibrated_gain(fusion);
  }
  MomentsAccumulator valid;
  for_valid([&](double reward) { valid.add(reward); });
  const Moments sample = valid.moments();
  return osla_gain(sample.count, shrinkage(sample.count, sample.mean, group.prior, width / 2.0).squared_bias);
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

void RolloutAllocator::ask_more(std::int64_t serial, Group& group, std::int64_t more) {
  for (std::int64_t index = group.asked; index < group.asked + more; ++index) {
    extra_.push_back(rollout_of(serial, index));
  }
  group.ask(more);
  static_cast<void>(
      group.make_room(group.asked));  // while it is in the cache; if there is no memory, the lease needs it
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

}  // namespace v05
