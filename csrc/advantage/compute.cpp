// The steps of the op: check the arguments, sum token rewards, collect the moments of groups and of the batch, compute
// the advantages of rollouts, and spread them over tokens.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "buffers.hpp"
#include "checks.hpp"
#include "groups.hpp"
#include "judge.hpp"
#include "lanes.hpp"
#include "table.hpp"
#include "tokens.hpp"
#include "v05/advantage.hpp"
#include "v05/pages.hpp"
#include "v05/parallel.hpp"

namespace v05 {
namespace {

// The number of groups or rows that a thread takes at a time. Moments of the batch are pooled by blocks of groups, so
// that the order of the sums is fixed.
constexpr std::int64_t kGroupBlock = 256;
constexpr std::int64_t kRowBlock = 4096;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

template <class GroupJudge>
using SumsOf = GroupSums<GroupJudge::Kind::kEnergy>;

// Computes the advantages of a batch whose rewards have been checked. `all_usable` means that no row is excluded.
// Throws if a trajectory has two different rewards.
template <class Real, class Out>
class Advantages {
 public:
  Advantages(const Outcomes<Real>& outcomes, const Groups& groups, std::span<const double> prior,
             const Options& options, std::span<Out> advantages, const Table& table, bool all_usable, int threads)
      : outcomes_(outcomes),
        groups_(groups),
        prior_(prior),
        options_(options),
        advantages_(advantages),
        table_(table),
        is_first_(first_of_trajectories(outcomes, groups)),
        all_usable_(all_usable),
        in_lanes_(all_usable && is_first_.empty() && fits_lanes(options)),
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
  // Processes one group after another, without scratch memory.
  template <class GroupJudge>
  void judge_contiguous() const {
    const auto batch = batch_moments<GroupJudge>([this](std::int64_t g) { return collect<GroupJudge>(rows_of(g)); });
    const std::int64_t groups_of_rows = kRowBlock * groups_.count / std::max<std::int64_t>(1, outcomes_.size());
    for_blocks(groups_.count, std::clamp<std::int64_t>(groups_of_rows, 1, kGroupBlock), outcomes_.size(), threads_,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 judge_groups<GroupJudge>(begin, end, batch);
               });
  }

  // Flattened, because passing the numbers of a group through memory between calls costs more than their arithmetic.
  template <class GroupJudge>
  [[gnu::flatten]] void judge_groups(std::int64_t begin, std::int64_t end, const BatchMoments& batch) const {
    for (std::int64_t g = begin; g < end; ++g) {
      if constexpr (std::is_same_v<GroupJudge, Judge<Group<false, false>>>) {
        g += side_by_side(g, end);
        if (g >= end) {
          break;
        }
      }
      const Part own = rows_of(g);
      const auto judge = judge_of<GroupJudge>(g, collect<GroupJudge>(own), batch);
      for (std::size_t row = own.begin; row < own.end; ++row) {
        write(row, judge);
      }
    }
  }

  // Judges groups of one size from g on, several at once, and returns their number.
  [[nodiscard]] std::int64_t side_by_side(std::int64_t g, std::int64_t end) const {
    if (!in_lanes_) {
      return 0;
    }
    return static_cast<std::int64_t>(
        judge_lanes(outcomes_.rewards, groups_.offsets, prior_, options_, advantages_, table_, at(g), at(end)));
  }

  // Processes groups whose rows are in any order, with tables that have one entry per group.
  template <class GroupJudge>
  void judge_scattered() const {
    const Scratch<SumsOf<GroupJudge>> collected(at(groups_.count) + 1);
    // On one thread, so that the rows of a group are added in order.
    for_scattered(groups_, 0, outcomes_.size(), collected.data(),
                  [this](std::size_t row, SumsOf<GroupJudge>& group) { add_row(row, group); });
    const auto sums_of = [&](std::int64_t g) -> const SumsOf<GroupJudge>& { return collected.data()[g]; };
    const auto batch = batch_moments<GroupJudge>(sums_of);
    const Scratch<GroupJudge> judges(at(groups_.count) + 1);
    for_blocks(groups_.count, kGroupBlock, groups_.count, threads_,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 for (std::int64_t g = begin; g < end; ++g) {
                   judges.data()[g] = judge_of<GroupJudge>(g, sums_of(g), batch);
                 }
               });
    for_blocks(outcomes_.size(), kRowBlock, outcomes_.size(), threads_,
               [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
                 for_scattered(groups_, begin, end, judges.data(),
                               [this](std::size_t row, const GroupJudge& judge) { write(row, judge); });
               });
  }

  template <class GroupJudge>
  [[nodiscard]] SumsOf<GroupJudge> collect(Part rows) const {
    SumsOf<GroupJudge> group{};
    for (std::size_t row = rows.begin; row < rows.end; ++row) {
      add_row(row, group);
    }
    return group;
  }

  [[nodiscard]] Part rows_of(std::int64_t g) const { return part_of(groups_.offsets, at(g), outcomes_.rewards.size()); }

  template <bool kEnergy>
  void add_row(std::size_t row, GroupSums<kEnergy>& group) const {
    if (is_first_.empty() ? all_usable_ || outcomes_.is_usable(row) : is_first_[row] != 0) {
      group.add(static_cast<double>(outcomes_.rewards[row]), energy_of<kEnergy>(row));
    }
  }

  template <bool kEnergy>
  [[nodiscard]] double energy_of(std::size_t row) const {
    if constexpr (kEnergy) {
      return outcomes_.energy[row];
    } else {
      return 0.0;
    }
  }

  template <class GroupJudge>
  void write(std::size_t row, const GroupJudge& judge) const {
    const bool usable = all_usable_ || outcomes_.is_usable(row);
    const double energy = energy_of<GroupJudge::Kind::kEnergy>(row);
    advantages_[row] =
        static_cast<Out>(usable ? judge(static_cast<double>(outcomes_.rewards[row]), energy, options_) : 0.0);
  }

  // The moments of the batch, if the baseline or the scale needs them. They are pooled in the order of groups within
  // blocks, then in the order of blocks.
  template <class GroupJudge, class SumsOfGroup>
  [[nodiscard]] BatchMoments batch_moments(const SumsOfGroup& sums_of) const {
    BatchMoments batch;
    if (!options_.wants_batch()) {
      return batch;
    }
    const bool asks_for_groups = needs_groups(options_.baseline);
    std::vector<BatchMoments> blocks(at((groups_.count + kGroupBlock - 1) / kGroupBlock));
    for_blocks(groups_.count, kGroupBlock, outcomes_.size(), threads_,
               [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
                 Moments rewards;
                 WeightedSums weighted;
                 GroupsOfBatch of_groups;
                 for (std::int64_t g = begin; g < end; ++g) {
                   const auto& sums = sums_of(g);
                   const Moments group = sums.rewards.moments();
                   rewards = merge(rewards, group);
                   weighted = merge(weighted, sums.weighted());
                   if (asks_for_groups) {
                     of_groups = merge(of_groups, v05::groups_of(group));
                   }
                 }
                 blocks[at(block)] = {.rewards = rewards, .weighted = weighted, .groups = of_groups};
               });
    for (const BatchMoments& block : blocks) {
      batch = {
          .rewards = merge(batch.rewards, block.rewards),
          .weighted = merge(batch.weighted, block.weighted),
          .groups = merge(batch.groups, block.groups),
      };
    }
    return batch;
  }

  // Makes the judge of the rollouts of group g, and writes the statistics of the group.
  template <class GroupJudge>
  [[nodiscard]] GroupJudge judge_of(std::int64_t g, const SumsOf<GroupJudge>& sums, const BatchMoments& batch) const {
    const Evidence evidence{
        .moments = sums.rewards.moments(),
        .weighted = sums.weighted(),
        .prior = prior_.empty() ? std::numeric_limits<double>::quiet_NaN() : prior_[at(g)],
        .batch = batch,
    };
    const typename GroupJudge::Kind group(evidence, options_, table_ || !options_.leave_one_out);
    if (table_) {
      write_statistics(table_, at(g), group, options_);
    }
    const Moments& population = options_.scale == Scale::kBatch ? batch.rewards : evidence.moments;
    return GroupJudge(group, evidence, options_, divisor_of(population, options_));
  }

  const Outcomes<Real>& outcomes_;
  const Groups& groups_;
  std::span<const double> prior_;
  const Options& options_;
  std::span<Out> advantages_;
  const Table& table_;
  std::vector<std::uint8_t> is_first_;  // the rows that count in the statistics; empty if all usable rows do
  bool all_usable_;
  bool in_lanes_;  // whether groups of one size are judged several at once
  int threads_;
};

// Checks rewards and computes their advantages with the judge that the options require.
template <class Real, class Out>
void judge_outcomes(const Outcomes<Real>& outcomes, const Groups& groups, std::span<const double> prior,
                    const Options& options, std::span<Out> advantages, const Table& table, int threads) {
  const bool all_finite = check_rewards(outcomes, options);
  const bool all_usable = outcomes.valid.empty() && all_finite;
  const Advantages<Real, Out> of_batch(outcomes, groups, prior, options, advantages, table, all_usable, threads);
  const bool alone = !options.leave_one_out;
  const auto compare = [&]<bool kReadsEnergy, bool kReadsBatch> {
    alone ? of_batch.template compute<Judge<Group<kReadsEnergy, kReadsBatch>>>()
          : of_batch.template compute<WeighedLeaveOneOutJudge<kReadsEnergy, kReadsBatch>>();
  };
  if (is_calibrated(options.baseline)) {
    alone ? of_batch.template compute<Judge<CalibratedGroup>>()
          : of_batch.template compute<CalibratedLeaveOneOutJudge>();
  } else if (needs_energy(options.baseline)) {
    needs_batch(options.baseline) ? compare.template operator()<true, true>()
                                  : compare.template operator()<true, false>();
  } else if (needs_batch(options.baseline)) {
    compare.template operator()<false, true>();
  } else {
    alone ? of_batch.template compute<Judge<Group<false, false>>>() : of_batch.template compute<LeaveOneOutJudge>();
  }
  if (!all_finite && table) {
    for_rows(outcomes.rewards.size(), groups, [&](std::size_t row, std::size_t group) {
      table.at(Statistic::kNonfinite, group) += outcomes.is_valid(row) && !outcomes.is_usable(row) ? 1.0 : 0.0;
    });
  }
}

// Computes one advantage per rollout, from outcome rewards or token rewards.
template <class Out>
void judge_rollouts(const Rollouts& rollouts, const Groups& groups, std::span<const double> prior,
                    const Options& options, std::span<Out> advantages, const Table& table, int threads) {
  const auto judge = [&]<class Real>(std::span<const Real> rewards) {
    const Outcomes<Real> outcomes{
        .rewards = rewards,
        .valid = rollouts.valid,
        .trajectory_ids = rollouts.trajectory_ids,
        .energy = rollouts.energy,
    };
    judge_outcomes(outcomes, groups, prior, options, advantages, table, threads);
  };
  if (!rollouts.by_token) {
    with_real(rollouts.rewards, [&]<class Real>(std::span<Real> rewards) { judge(std::span<const Real>(rewards)); });
    return;
  }
  const std::vector<double> outcomes = sum_tokens(rollouts.rewards, rollouts.mask, rollouts.count, threads);
  try {
    judge(std::span<const double>(outcomes));
  } catch (const std::invalid_argument&) {  // the sums depend on the mask, so a bad mask may be the cause
    check_mask(rollouts.mask, rollouts.count);
    throw;
  }
}

}  // namespace

void compute_advantages(const Rollouts& rollouts, const Groups& groups, std::span<const double> prior,
                        const Options& options, const Buffer& out, const Table& table, int threads) {
  if (groups.offsets.empty()) {
    check_ids(groups.ids, groups.count);
  } else {
    check_offsets("group_offsets", groups.offsets, static_cast<std::int64_t>(rollouts.count));
  }
  if (!rollouts.cu_seqlens.empty()) {
    check_offsets("cu_seqlens", rollouts.cu_seqlens, static_cast<std::int64_t>(out.size));
  }
  if (options.bounded()) {
    check_prior(prior, options);
  }
  check_energy(rollouts.energy, rollouts.valid);
  if (table) {
    prefer_huge_pages(std::span(table.data, kStatistics.size() * table.groups));
  }
  with_real(out, [&]<class Out>(std::span<Out> to) {
    prefer_huge_pages(to);
    if (!rollouts.mask && rollouts.cu_seqlens.empty()) {
      judge_rollouts(rollouts, groups, prior, options, to, table, threads);
      return;
    }
    std::vector<Out> advantages(rollouts.count);
    judge_rollouts(rollouts, groups, prior, options, std::span(advantages), table, threads);
    spread_tokens(std::span<const Out>(advantages), rollouts, to, threads);
  });
}

}  // namespace v05
