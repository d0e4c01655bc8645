// Decisions on a group whose rollouts have all settled: it gets more rollouts, waits for a share of the total, or is
// closed.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "checks.hpp"
#include "room.hpp"
#include "v05/allocator.hpp"
#include "v05/fusion.hpp"
#include "v05/moments.hpp"
#include "v05/stopping.hpp"

namespace v05 {

// Allocates memory for the decisions that follow when `settled` rollouts settle, and for `retried` rollouts that are
// queued again.
void RolloutAllocator::prepare_decisions(std::size_t settled, std::size_t retried) {
  const std::size_t groups = std::min(settled, static_cast<std::size_t>(counts_.open_groups));  // each is decided once
  make_room(closed_, groups);
  make_room(candidates_, options_.rule == BudgetRule::kTotal ? groups : 0);
  const std::int64_t most = options_.maximum - options_.initial;  // the most that a group asks for at a time
  const std::int64_t more = is_sequential(options_.rule) ? std::min(options_.chunk.value_or(most), most) : 0;
  make_room(extra_, retried + (groups * static_cast<std::size_t>(more)));
}

// Calls `body` with a function of `further`: the gain of one more rollout after so many further rollouts, if the
// estimates for a group with these valid rewards stay the same.
template <class Rewards, class Body>
auto RolloutAllocator::with_gain(const Rewards& for_each, double prior, const Body& body) const {
  const double width = options_.highest_reward - options_.lowest_reward;
  const auto scaled = [&](double reward) { return (reward - options_.lowest_reward) / width; };
  if (options_.calibration) {
    std::int64_t count = 0;
    double successes = 0.0;
    for_each([&](double reward) {
      ++count;
      successes += scaled(reward);
    });
    const CalibratedFusion fusion = calibrated(count, successes, believe(scaled(prior), *options_.calibration));
    const bool of_gradient = options_.rule == BudgetRule::kVariance ||
                             (options_.rule == BudgetRule::kTotal && options_.calibration->knows_energies());
    if (of_gradient) {
      const double variance = gradient_variance(fusion, *options_.calibration);
      return body([=](std::int64_t further) { return variance_gain(count + further, variance); });
    }
    return body([&](std::int64_t further) { return calibrated_gain(fusion, further); });
  }
  MomentsAccumulator valid;
  for_each([&](double reward) { valid.add(reward); });
  const Moments sample = valid.moments();
  const double squared_bias = shrinkage(sample.count, sample.mean, prior, width / 2.0).squared_bias;
  return body([&](std::int64_t further) { return osla_gain(sample.count + further, squared_bias); });
}

// How many rollouts a group with these valid rewards gets at once, at most `room`; 0 if it has enough.
template <class Rewards>
std::int64_t RolloutAllocator::wanted(const Rewards& for_each, double prior, std::int64_t room) const {
  return with_gain(for_each, prior, [&](const auto& gain_after) {
    if (options_.chunk) {
      return gain_after(0) > cost_ ? std::min(*options_.chunk, room) : std::int64_t{0};
    }
    std::int64_t more = 0;
    while (more < room && gain_after(more) > cost_) {
      ++more;
    }
    return more;
  });
}

std::vector<std::int64_t> RolloutAllocator::would_ask(std::span<const std::int64_t> counts,
                                                      std::span<const std::int64_t> successes,
                                                      std::span<const double> priors) const {
  if (!is_sequential(options_.rule)) {
    refuse("rules 'uniform' and 'total' do not decide by a group's own rewards; would_ask is for the others");
  }
  if (successes.size() != counts.size() || priors.size() != counts.size()) {
    refuse("counts has ", counts.size(), " rows, successes ", successes.size(), " and priors ", priors.size(),
           "; give one of each per group");
  }
  require_in_range("priors", priors, options_);
  std::vector<std::int64_t> asked;
  asked.reserve(counts.size());
  for (std::size_t row = 0; row < counts.size(); ++row) {
    const std::int64_t count = counts[row];
    const std::int64_t right = successes[row];
    if (count < 1 || count > options_.maximum || right < 0 || right > count) {
      refuse("row ", row, " has counts ", count, " and successes ", right,
             "; give 1 <= counts <= maximum=", options_.maximum, " and 0 <= successes <= counts");
    }
    const auto for_each = [&](const auto& body) {
      for (std::int64_t index = 0; index < count; ++index) {
        body(index < right ? options_.highest_reward : options_.lowest_reward);
      }
    };
    asked.push_back(wanted(for_each, options_.within(priors[row]), options_.maximum - count));
  }
  return asked;
}

// Decides on a group after all rollouts that it asked for have settled.
void RolloutAllocator::decide(std::int64_t serial, Group& group) {
  const std::int64_t room = options_.maximum - group.asked;
  const bool shares = options_.rule == BudgetRule::kTotal;
  if (room == 0 || options_.rule == BudgetRule::kUniform || (shares && total_left() == 0)) {
    close(serial);
    return;
  }
  const auto for_each = [&](const auto& body) {
    for (const RolloutState state : group.rollouts()) {
      if (!std::isnan(state.reward())) {
        body(state.reward());
      }
    }
  };
  if (shares) {
    // The decrease of the error of the group's baseline or, if energies are known, of the variance of its gradient with
    // one more rollout; centred units.
    const double gain = with_gain(for_each, group.prior, [](const auto& gain_after) { return gain_after(0); });
    candidates_.push_back({.gain = gain, .serial = serial});
    std::ranges::push_heap(candidates_, std::less{});
  } else if (const std::int64_t more = wanted(for_each, group.prior, room); more > 0) {
    ask_more(serial, group, more);
  } else {
    close(serial);
  }
}

// Gives rollouts of the total to the group with the largest gain, and appends that candidate to `promoted`.
void RolloutAllocator::promote_candidate(std::vector<Candidate>& promoted) {
  const Candidate chosen = candidates_.front();
  Group& group = group_of(chosen.serial);
  const std::int64_t more = std::min({options_.chunk.value_or(1), options_.maximum - group.asked, total_left()});
  make_room(extra_, static_cast<std::size_t>(more));
  promoted.push_back(chosen);

  std::ranges::pop_heap(candidates_, std::less{});
  candidates_.pop_back();
  if (!candidates_.empty()) {  // most likely the next one, and not in the cache
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
      group.make_room(group.asked));  // now, while the group is in the cache; on failure the lease tries again
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
