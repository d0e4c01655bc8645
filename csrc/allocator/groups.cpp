// Opening, growing and draining groups.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
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

}  // namespace

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
  const std::vector<std::int64_t> asked(counts.begin(), counts.end());  // a copy, which no other thread changes
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
  std::unique_ptr<GroupIds<Id>> first;  // the first groups decide the type of ids
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
