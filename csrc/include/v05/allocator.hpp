// The bookkeeping of rollout budgets: which rollouts to run next, and when a group has enough of them. No Python and no
// clock.
//
// Groups are kept in a window, in the order in which they were opened. `serial` is a group's number since construction.
// Its slot is serial minus the first serial in the window. A rollout's number has the bit fields (serial, index), a
// lease id the bit fields (serial, index, attempt). Ids are decoded and never looked up, so a lease takes no memory,
// and the id of a forgotten lease can still be decoded. A drained group keeps its empty slot until every group that was
// opened before it is drained too.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "v05/fusion.hpp"
#include "v05/group_ids.hpp"

namespace v05 {

class ByteReader;

enum class BudgetRule : std::uint8_t { kOsla, kUniform, kCalibrated, kVariance, kTotal };

// Whether the rule decides for each group by its own rewards alone.
inline bool is_sequential(BudgetRule rule) { return rule != BudgetRule::kUniform && rule != BudgetRule::kTotal; }

// The rule called `name`. Throws std::invalid_argument that lists the known names if there is none.
BudgetRule find_budget_rule(std::string_view name);

struct AllocatorOptions {
  BudgetRule rule = BudgetRule::kOsla;
  std::int64_t initial = 4;               // rollouts of a group before its first test
  std::int64_t maximum = 16;              // rollouts of a group, invalid ones included
  std::optional<double> cost;             // cost of a rollout in units of the rule's gain; empty is default_cost()
  std::optional<std::int64_t> total;      // rollouts of all groups that are open together
  std::optional<std::int64_t> chunk = 1;  // rollouts added at a time; empty is as many as the rule is expected to take
  std::int64_t seed = 0;
  double lowest_reward = 0.0;
  double highest_reward = 1.0;
  std::optional<Calibration> calibration;
  std::int64_t max_attempts = 3;  // failures after which a rollout is closed as invalid

  // 1 / maximum^2 or, for rule kVariance, the gain from the first rollout of a new prompt.
  [[nodiscard]] double default_cost() const;

  // Clips a reward or prior to the reward range, which rounding may have exceeded.
  [[nodiscard]] double within(double value) const { return std::clamp(value, lowest_reward, highest_reward); }
};

using GroupIdList = std::variant<std::vector<std::int64_t>, std::vector<std::string>>;

// V0's allocation before any rollout (arXiv 2602.03584). Every group gets `lowest` rollouts. Each further rollout, up
// to `total` in all and `highest` per group, goes to the group whose utility grows most (the first of equals), given
// its predicted success rate `rates[g]`. None is added once no utility grows. A rate of NaN counts as 1/2.
std::vector<std::int64_t> predicted_counts(std::span<const double> rates, std::int64_t total, std::int64_t lowest,
                                           std::int64_t highest);

// Row i is one rollout to run.
struct Leases {
  std::vector<std::int64_t> lease_ids;
  GroupIdList groups;
  std::vector<std::int64_t> indices;
  std::vector<std::int64_t> seeds;
};

// The rewards of group g are rewards[offsets[g] .. offsets[g + 1]), in index order, NaN for an invalid rollout.
struct ClosedGroups {
  GroupIdList group_ids;
  std::vector<std::int64_t> offsets;
  std::vector<double> rewards;
  std::vector<double> priors;
};

struct AllocatorCounts {
  std::int64_t open_groups = 0;    // now
  std::int64_t closed_groups = 0;  // now, waiting for drain
  std::int64_t queued = 0;         // rollouts that wait for a lease now
  std::int64_t leased = 0;         // rollouts that are leased now
  std::int64_t reported = 0;       // reports applied; this and all below count since construction
  std::int64_t failed = 0;         // failures applied
  std::int64_t expired = 0;        // leases that expired
  std::int64_t invalid = 0;        // rollouts that settled without a reward
  std::int64_t duplicate = 0;      // ids whose lease was reported before
  std::int64_t late = 0;           // ids whose lease failed or expired before, or whose group was drained
  std::int64_t unknown = 0;        // ids that were never handed out
};

// The state of a rollout in eight bytes. Once the rollout has settled they are its reward. Until then they are a NaN
// with the sign bit set, whose payload is the time of the lease, or all ones while the rollout waits for a lease.
class RolloutState {
 public:
  RolloutState() = default;  // queued
  static RolloutState leased(std::int64_t since) {
    return RolloutState(kUnsettled | (static_cast<std::uint64_t>(since) & kLastTime));
  }
  static RolloutState settled(double reward) {
    return RolloutState(std::bit_cast<std::uint64_t>(std::isnan(reward) ? kInvalid : reward));
  }
  static RolloutState from_bits(std::uint64_t bits) { return RolloutState(bits); }

  [[nodiscard]] bool is_queued() const { return bits_ == kQueued; }
  [[nodiscard]] bool is_settled() const { return bits_ < kUnsettled; }
  [[nodiscard]] bool is_leased() const { return !is_settled() && !is_queued(); }
  [[nodiscard]] std::int64_t since() const { return static_cast<std::int64_t>(bits_ & kLastTime); }  // of a lease
  [[nodiscard]] double reward() const { return std::bit_cast<double>(bits_); }                       // NaN: invalid
  [[nodiscard]] std::uint64_t bits() const { return bits_; }

 private:
  explicit RolloutState(std::uint64_t bits) : bits_(bits) {}

  static constexpr double kInvalid = std::numeric_limits<double>::quiet_NaN();
  static constexpr std::uint64_t kUnsettled = 0xfff8'0000'0000'0000U;
  static constexpr std::uint64_t kLastTime = 0x0003'ffff'ffff'ffffU;  // 35 years of microseconds
  static constexpr std::uint64_t kQueued = ~std::uint64_t{0};

  std::uint64_t bits_ = kQueued;
};

// Two numbers packed into one, of which the lower has `bits` bits.
inline std::int64_t join_bits(std::int64_t high, std::int64_t low, unsigned bits) {
  return static_cast<std::int64_t>((static_cast<std::uint64_t>(high) << bits) | static_cast<std::uint64_t>(low));
}
inline std::int64_t high_bits(std::int64_t joined, unsigned bits) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(joined) >> bits);
}
inline std::int64_t low_bits(std::int64_t joined, unsigned bits) {
  return joined - join_bits(high_bits(joined, bits), 0, bits);
}

// Thread-safe. With every rule except kTotal, decisions depend only on a group's own rewards in index order, so any
// order of arrival gives the same allocation. Times are microseconds of 0 or more on one monotonic clock of the caller.
class RolloutAllocator {
 public:
  explicit RolloutAllocator(const AllocatorOptions& options);

  // A call that throws has changed nothing: memory is allocated before anything changes, or changes are undone.

  // Opens all of the groups, or none if an argument is invalid (std::invalid_argument). `counts` are the numbers of
  // rollouts after which each group is tested, options.initial if it is empty. Rollouts beyond options.initial are
  // queued like extra rollouts.
  void open(const GroupIdList& ids, std::span<const double> priors, std::span<const std::int64_t> counts);

  // Hands out at most `limit` rollouts: first those of tested groups and retries, then those of new groups in open
  // order, and with rule kTotal then those of the groups with the largest gain.
  Leases lease(std::int64_t limit, std::int64_t now);

  // Each lease settles at most once; ids of leases that are not out are only counted. If a reward is out of range,
  // nothing is applied (std::invalid_argument).
  void report(std::span<const std::int64_t> lease_ids, std::span<const double> rewards);
  void fail(std::span<const std::int64_t> lease_ids);

  // Fails every lease that has been out for at least `older_than` seconds, in open order, and returns their number.
  std::int64_t expire(double older_than, std::int64_t now);

  // How many rollouts a sequential rule adds at once to each group of `counts` rollouts, of which `successes` have the
  // highest reward and the others the lowest; 0 if it closes the group. Depends only on the options.
  [[nodiscard]] std::vector<std::int64_t> would_ask(std::span<const std::int64_t> counts,
                                                    std::span<const std::int64_t> successes,
                                                    std::span<const double> priors) const;

  [[nodiscard]] bool done() const;
  [[nodiscard]] AllocatorCounts counts() const;

  // Returns the closed groups in open order and forgets them, unless hand_over throws.
  ClosedGroups drain(const std::function<void(const ClosedGroups&)>& hand_over = {});

  // Everything a new process needs to resume. The workers with the present leases will be gone, so in the snapshot
  // these rollouts wait again, at the head of the queue, and the attempt does not count. Equal allocators have equal
  // bytes.
  [[nodiscard]] std::string snapshot() const;

  // Throws std::invalid_argument if `blob` is not an intact snapshot of this version.
  static std::unique_ptr<RolloutAllocator> restore(std::string_view blob);

 private:
  struct Group {
    // States of the first `room` rollouts; the others are queued. A vector would take 16 bytes more.
    std::unique_ptr<RolloutState[]> states;  // NOLINT(modernize-avoid-c-arrays)
    double prior = 0.0;
    std::uint16_t asked = 0;  // 0 once the group is drained
    std::uint16_t settled = 0;
    std::uint32_t room = 0;

    [[nodiscard]] RolloutState state(std::size_t index) const { return index < room ? states[index] : RolloutState(); }
    // Only for a group whose rollouts have all been leased.
    [[nodiscard]] std::span<RolloutState> rollouts() const { return {states.get(), asked}; }
    void ask(std::int64_t more) { asked = static_cast<std::uint16_t>(asked + more); }
    // Returns false and changes nothing if there is no memory.
    [[nodiscard]] bool make_room(std::size_t rollouts) { return rollouts <= room || grow(rollouts); }
    void require_room(std::size_t rollouts) {
      if (!make_room(rollouts)) {
        throw std::bad_alloc();
      }
    }
    // Grows by four and does not double, because most groups stop before the next doubling.
    [[nodiscard]] bool grow(std::size_t rollouts);
  };

  // A group whose rollouts have all settled, and which waits for a share of the total.
  struct Candidate {
    double gain;
    std::int64_t serial;

    // Of groups with equal gains, the one that was opened first comes first.
    [[nodiscard]] bool operator<(const Candidate& other) const {
      return gain != other.gain ? gain < other.gain : serial > other.serial;
    }
  };

  [[nodiscard]] std::int64_t rollout_of(std::int64_t serial, std::int64_t index) const {
    return join_bits(serial, index, index_bits_);
  }
  [[nodiscard]] std::int64_t serial_of(std::int64_t rollout) const { return high_bits(rollout, index_bits_); }
  [[nodiscard]] std::int64_t index_of(std::int64_t rollout) const { return low_bits(rollout, index_bits_); }
  [[nodiscard]] std::size_t slot_of(std::int64_t serial) const {
    return static_cast<std::size_t>(serial - first_serial_);
  }
  [[nodiscard]] Group& group_of(std::int64_t serial) { return groups_[slot_of(serial)]; }
  [[nodiscard]] RolloutState& state_of(std::int64_t rollout) {
    return group_of(serial_of(rollout)).states[static_cast<std::size_t>(index_of(rollout))];
  }
  [[nodiscard]] bool in_window(std::int64_t serial) const { return serial >= first_serial_ && serial < opened_; }
  [[nodiscard]] bool holds(std::int64_t rollout) const {
    const std::int64_t serial = serial_of(rollout);
    return in_window(serial) && index_of(rollout) < groups_[slot_of(serial)].asked;
  }
  [[nodiscard]] std::int64_t failures_of(std::int64_t rollout) const;
  [[nodiscard]] std::int64_t fresh() const { return (opened_ * options_.initial) - initial_leased_; }
  [[nodiscard]] std::size_t extra_left() const { return extra_.size() - extra_leased_; }
  [[nodiscard]] std::int64_t total_left() const { return options_.total.value_or(0) - spent_; }
  [[nodiscard]] GroupIdList ids_of(std::span<const std::int64_t> serials) const;
  void prefetch_group(std::int64_t lease_id) const;
  void prefetch_states(std::int64_t lease_id) const;
  [[nodiscard]] std::optional<std::int64_t> find_leased(std::int64_t lease_id, AllocatorCounts& strays) const;

  // These may allocate memory. They run before anything changes.
  template <class Id>
  void open_groups(const std::vector<Id>& rows, std::span<const double> priors, std::span<const std::int64_t> counts);
  void promote_candidate(std::vector<Candidate>& promoted);
  void prepare_decisions(std::size_t settled, std::size_t retried);
  void prepare_failures(std::span<const std::int64_t> rollouts);

  // These change the state and allocate no memory.
  [[nodiscard]] std::optional<std::int64_t> next_rollout();
  template <class Rewards, class Body>
  [[nodiscard]] auto with_gain(const Rewards& for_each, double prior, const Body& body) const;
  template <class Rewards>
  [[nodiscard]] std::int64_t wanted(const Rewards& for_each, double prior, std::int64_t room) const;
  void settle(std::int64_t rollout, double reward);
  void give_up(std::int64_t rollout);
  void decide(std::int64_t serial, Group& group);
  void ask_more(std::int64_t serial, Group& group, std::int64_t more);
  void close(std::int64_t serial);
  void close_candidates_if_spent();
  void forget(std::int64_t serial);

  // The parts of a snapshot (snapshot.cpp), in order.
  void read(ByteReader& in);
  [[nodiscard]] std::int64_t read_groups(ByteReader& in);
  void read_queue(ByteReader& in, std::int64_t queued);
  void read_failures(ByteReader& in);
  void read_closed(ByteReader& in);

  AllocatorOptions options_;
  double cost_;
  unsigned index_bits_ = 0;
  unsigned attempt_bits_ = 0;
  mutable std::mutex mutex_;

  std::deque<Group> groups_;
  // Pointers, because moving them allocates no memory.
  std::variant<std::unique_ptr<GroupIds<std::int64_t>>, std::unique_ptr<GroupIds<std::string>>> ids_;
  std::int64_t first_serial_ = 0;  // first serial in the window
  std::int64_t opened_ = 0;        // the next serial

  // The queues of rollouts that wait for a lease, and how many of each were leased: first extra rollouts and retries,
  // then initial rollouts.
  std::vector<std::int64_t> extra_;
  std::size_t extra_leased_ = 0;
  std::int64_t initial_leased_ = 0;

  // For rule kTotal only: a heap of candidates, and how much of the total is assigned to the groups that are open.
  std::vector<Candidate> candidates_;
  std::int64_t spent_ = 0;

  std::unordered_map<std::int64_t, std::int64_t> failures_;  // by rollout; most rollouts never fail
  std::vector<std::int64_t> closed_;                         // serials in the order of closing
  AllocatorCounts counts_;                                   // without `queued`, which is derived
};

}  // namespace v05
