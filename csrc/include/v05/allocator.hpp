// Rollout budget bookkeeping: which rollouts to run next, and when a group has enough of them. No Python.
//
// Groups live in a window in open order. `serial` is a group's number since construction, its slot is serial minus the
// first serial still in the window. A rollout is the number serial * maximum + index, a lease is rollout * max_attempts
// + attempt: ids are decoded, never looked up, so a lease costs no memory and the id of a forgotten one still says what
// it was. A drained group keeps its (empty) slot until every group opened before it is drained too.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "v05/group_ids.hpp"

namespace v05 {

enum class BudgetRule : std::uint8_t { kOsla, kUniform };

// The rule called `name`; std::invalid_argument that lists the known names if there is none.
BudgetRule find_budget_rule(std::string_view name);

struct AllocatorOptions {
  BudgetRule rule = BudgetRule::kOsla;
  std::int64_t initial = 4;    // rollouts of a group before its first test
  std::int64_t maximum = 16;   // rollouts of a group, invalid ones included
  std::optional<double> cost;  // of a rollout, in units of the estimated error; none is 1 / maximum^2
  std::int64_t chunk = 1;      // rollouts added at a time
  std::int64_t seed = 0;
  double lowest_reward = 0.0;
  double highest_reward = 1.0;
  std::int64_t max_attempts = 3;  // failures after which a rollout is closed as invalid
};

using GroupIdList = std::variant<std::vector<std::int64_t>, std::vector<std::string>>;

// Row i is one rollout to run.
struct Leases {
  std::vector<std::int64_t> lease_ids;
  GroupIdList groups;
  std::vector<std::int64_t> indices;
  std::vector<std::int64_t> seeds;
};

// The rewards of group g are rewards[offsets[g] .. offsets[g + 1]), in index order, NaN where the rollout is invalid.
struct ClosedGroups {
  GroupIdList group_ids;
  std::vector<std::int64_t> offsets;
  std::vector<double> rewards;
  std::vector<double> priors;
};

struct AllocatorCounts {
  std::int64_t open_groups = 0;    // now
  std::int64_t closed_groups = 0;  // now: waiting for drain
  std::int64_t queued = 0;         // rollouts now waiting for a lease
  std::int64_t leased = 0;         // rollouts now out
  std::int64_t reported = 0;       // since construction, like all below: reports applied
  std::int64_t failed = 0;         // failures applied
  std::int64_t invalid = 0;        // rollouts that settled without a reward
  std::int64_t duplicate = 0;      // ids whose lease was reported before
  std::int64_t late = 0;           // ids whose lease failed before, or whose group was drained
  std::int64_t unknown = 0;        // ids that were never handed out
};

// Thread-safe. Decisions read a group's own rewards in index order only: any order of arrival gives the same
// allocation.
class RolloutAllocator {
 public:
  explicit RolloutAllocator(const AllocatorOptions& options);

  // All of the groups or, if an argument is at fault (std::invalid_argument), none.
  void open(const GroupIdList& ids, std::span<const double> priors);

  // At most `limit` rollouts: those of tested groups and retries first, then those of new groups in open order.
  Leases lease(std::int64_t limit);

  // Each reward at most once; ids that are not out are counted. A reward out of range refuses the whole batch.
  void report(std::span<const std::int64_t> lease_ids, std::span<const double> rewards);
  void fail(std::span<const std::int64_t> lease_ids);

  [[nodiscard]] bool done() const;
  [[nodiscard]] AllocatorCounts counts() const;

  // The closed groups in open order; they are forgotten.
  ClosedGroups drain();

 private:
  struct Group {
    std::vector<double> rewards;  // of the rollouts asked for so far; none once drained
    double prior = 0.0;
    std::int32_t settled = 0;
  };

  [[nodiscard]] std::size_t slot_of(std::int64_t serial) const;
  [[nodiscard]] std::int64_t failures_of(std::int64_t rollout) const;
  [[nodiscard]] double& reward_of(std::int64_t rollout);
  [[nodiscard]] std::int64_t queued() const;
  [[nodiscard]] std::optional<std::int64_t> find_leased(std::int64_t lease_id);
  [[nodiscard]] GroupIdList ids_of(std::span<const std::int64_t> serials) const;
  [[nodiscard]] bool takes_more(const Group& group);
  void settle(std::int64_t rollout, double reward);
  void ask_more(std::int64_t serial, Group& group);
  void forget(std::int64_t serial);

  AllocatorOptions options_;
  double cost_;
  mutable std::mutex mutex_;

  std::deque<Group> groups_;
  std::variant<GroupIds<std::int64_t>, GroupIds<std::string>> ids_;
  std::int64_t opened_ = 0;  // the next serial

  // What waits for a lease: extra rollouts and retries, then the initial rollouts, of which the first initial_leased_
  // went out.
  std::deque<std::int64_t> extra_;
  std::int64_t initial_leased_ = 0;

  std::unordered_map<std::int64_t, std::int64_t> failures_;  // by rollout; most never fail
  std::vector<std::int64_t> closed_;                         // serials, in order of closing
  std::vector<double> valid_;                                // scratch
  AllocatorCounts counts_;                                   // without `queued`, which is derived
};

}  // namespace v05
