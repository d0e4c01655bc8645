// The names of the rules, and checks of the options.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "checks.hpp"
#include "v05/allocator.hpp"
#include "v05/stopping.hpp"

namespace v05 {
namespace {

constexpr auto kRules = std::to_array<std::pair<std::string_view, BudgetRule>>({
    {"osla", BudgetRule::kOsla},
    {"uniform", BudgetRule::kUniform},
    {"calibrated", BudgetRule::kCalibrated},
    {"variance", BudgetRule::kVariance},
    {"total", BudgetRule::kTotal},
});

void require_counts(const AllocatorOptions& options) {
  if (options.initial < 1) {
    refuse("initial=", options.initial, " is not positive; a group needs at least 1 rollout");
  }
  if (options.maximum < options.initial || options.maximum > kLargestCount) {
    refuse("maximum=", options.maximum, " is not between initial=", options.initial, " and ", kLargestCount,
           "; change maximum or initial");
  }
  if (options.chunk && *options.chunk < 1) {
    refuse("chunk=", *options.chunk, " is not positive; use 1 to add rollouts one by one");
  }
  if (options.max_attempts < 1 || options.max_attempts > kLargestCount) {
    refuse("max_attempts=", options.max_attempts, " is not between 1 and ", kLargestCount,
           "; use 1 to give a rollout up at its first failure");
  }
}

// Rejects inputs that the rule does not read, because giving them is a mistake of the caller.
void require_rule_inputs(const AllocatorOptions& options) {
  const bool needs_calibration = options.rule == BudgetRule::kCalibrated || options.rule == BudgetRule::kVariance;
  if (options.cost && !is_sequential(options.rule)) {
    refuse("cost=", *options.cost, " has no meaning for rules 'uniform' and 'total'; leave it out");
  }
  if (options.total.has_value() != (options.rule == BudgetRule::kTotal)) {
    refuse(options.total ? "total is given; only rule='total' takes it, leave it out"
                         : "total=None; rule='total' needs the number of rollouts to share out");
  }
  if (options.total && *options.total < options.initial) {
    refuse("total=", *options.total, " does not hold the initial=", options.initial, " rollouts of a group; raise it");
  }
  if (!options.chunk && options.rule == BudgetRule::kTotal) {
    refuse("chunk='look' has no meaning for rule 'total', which has no cost to look ahead to; give an integer");
  }
  if (needs_calibration && !options.calibration) {
    refuse("calibration=None; rules 'calibrated' and 'variance' need a Calibration fitted on past groups");
  }
  if (options.calibration && !needs_calibration && options.rule != BudgetRule::kTotal) {
    refuse("calibration is given; only rules 'calibrated', 'variance' and 'total' read it, leave it out");
  }
  if (options.calibration && !options.calibration->within_bounds()) {
    refuse("calibration is out of bounds; see v05.methods.Calibration");
  }
}

}  // namespace

double AllocatorOptions::default_cost() const {
  if (rule == BudgetRule::kVariance && calibration) {
    return fresh_prompt_gain(*calibration);
  }
  return 1.0 / (static_cast<double>(maximum) * static_cast<double>(maximum));
}

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
      cost_(options.cost.value_or(options.default_cost())),
      ids_(std::make_unique<GroupIds<std::int64_t>>()) {
  require_counts(options);
  require_rule_inputs(options);
  if (!(cost_ >= 0.0) || std::isinf(cost_)) {
    refuse("cost=", cost_, " is not a finite number >= 0; use None for the default");
  }
  const double width = options.highest_reward - options.lowest_reward;
  if (!(width > 0.0) || std::isinf(width)) {
    refuse("reward_range=(", options.lowest_reward, ", ", options.highest_reward,
           ") is not a finite range; give (lowest, highest) with lowest < highest");
  }
  index_bits_ = static_cast<unsigned>(std::bit_width(static_cast<std::uint64_t>(options.maximum - 1)));
  attempt_bits_ = static_cast<unsigned>(std::bit_width(static_cast<std::uint64_t>(options.max_attempts - 1)));
}

}  // namespace v05
