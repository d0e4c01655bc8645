// Saves and restores the allocator as bytes. Values that can be derived are not written. Values that are read are
// checked for consistency, so that no blob can lead to a state that the allocator could not have reached.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "v05/allocator.hpp"
#include "v05/bytes.hpp"

namespace v05 {
namespace {

constexpr std::string_view kMagic = "v05alloc";
constexpr std::uint32_t kVersion = 2;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

constexpr std::int64_t kNoChunk = 0;

// Far enough from overflow for counters to grow further.
constexpr std::int64_t kLargestCounter = std::numeric_limits<std::int64_t>::max() / 2;

void believe(bool consistent, const char* what) {
  if (!consistent) {
    throw BytesError(std::string("its content is contradictory: ") + what);
  }
}

template <Number T>
void put_optional(ByteWriter& out, const std::optional<T>& value) {
  out.put(static_cast<std::uint8_t>(value.has_value()));
  out.put(value.value_or(T{}));
}

template <Number T>
std::optional<T> get_optional(ByteReader& in) {
  const bool present = in.get<std::uint8_t>() != 0;
  const T value = in.get<T>();
  return present ? std::optional<T>(value) : std::nullopt;
}

void put_options(ByteWriter& out, const AllocatorOptions& options) {
  out.put(static_cast<std::uint8_t>(options.rule));
  out.put(options.initial);
  out.put(options.maximum);
  put_optional(out, options.cost);
  put_optional(out, options.total);
  out.put(options.chunk.value_or(kNoChunk));
  out.put(options.seed);
  out.put(options.lowest_reward);
  out.put(options.highest_reward);
  out.put(static_cast<std::uint8_t>(options.calibration.has_value()));
  // The format always has the numbers of a calibration. Without a calibration they are not used.
  const Calibration calibration = options.calibration.value_or(Calibration{.kappa = 1.0, .eps = 0.5});
  for (const double number : {
           calibration.alpha,
           calibration.beta,
           calibration.kappa,
           calibration.eps,
           calibration.delta0,
           calibration.delta1,
       }) {
    out.put(number);
  }
  out.put(options.max_attempts);
}

AllocatorOptions get_options(ByteReader& in) {
  AllocatorOptions options;
  const auto rule = in.get<std::uint8_t>();
  believe(rule <= static_cast<std::uint8_t>(BudgetRule::kTotal), "the rule");
  options.rule = static_cast<BudgetRule>(rule);
  options.initial = in.get<std::int64_t>();
  options.maximum = in.get<std::int64_t>();
  options.cost = get_optional<double>(in);
  options.total = get_optional<std::int64_t>(in);
  const auto chunk = in.get<std::int64_t>();
  options.chunk = chunk == kNoChunk ? std::nullopt : std::optional(chunk);
  options.seed = in.get<std::int64_t>();
  options.lowest_reward = in.get<double>();
  options.highest_reward = in.get<double>();
  const bool calibrated = in.get<std::uint8_t>() != 0;
  Calibration calibration;
  for (double* number : {
           &calibration.alpha,
           &calibration.beta,
           &calibration.kappa,
           &calibration.eps,
           &calibration.delta0,
           &calibration.delta1,
       }) {
    *number = in.get<double>();
  }
  options.calibration = calibrated ? std::optional(calibration) : std::nullopt;
  options.max_attempts = in.get<std::int64_t>();
  return options;
}

void put_id(ByteWriter& out, std::int64_t id) { out.put(id); }
void put_id(ByteWriter& out, const std::string& id) {
  out.put_size(id.size());
  out.put_bytes(id);
}

void get_id(ByteReader& in, std::int64_t& id) { id = in.get<std::int64_t>(); }
void get_id(ByteReader& in, std::string& id) { id = in.get_bytes(in.get_size(1)); }

// The counters that cannot be derived, in the order of the format.
constexpr std::array kCounters = {
    &AllocatorCounts::reported,  &AllocatorCounts::failed, &AllocatorCounts::expired, &AllocatorCounts::invalid,
    &AllocatorCounts::duplicate, &AllocatorCounts::late,   &AllocatorCounts::unknown,
};

}  // namespace

std::string RolloutAllocator::snapshot() const {
  const std::scoped_lock lock(mutex_);
  ByteWriter out;
  put_options(out, options_);
  for (const auto counter : kCounters) {
    out.put(counts_.*counter);
  }
  out.put(opened_);
  out.put(initial_leased_);
  out.put(spent_);

  std::vector<std::int64_t> queue;
  out.put(static_cast<std::uint8_t>(ids_.index()));
  out.put_size(groups_.size());
  std::visit(
      [&](const auto& ids) {
        for (std::size_t slot = 0; slot < groups_.size(); ++slot) {
          const Group& group = groups_[slot];
          out.put(group.asked);
          if (group.asked == 0) {
            continue;
          }
          put_id(out, (*ids)[slot]);
          out.put(group.prior);
          for (std::size_t index = 0; index < group.asked; ++index) {
            const RolloutState state = group.state(index);
            if (state.is_leased()) {
              queue.push_back(
                  rollout_of(first_serial_ + static_cast<std::int64_t>(slot), static_cast<std::int64_t>(index)));
            }
            out.put(state.is_leased() ? RolloutState().bits() : state.bits());
          }
        }
      },
      ids_);

  queue.insert(queue.end(), extra_.begin() + static_cast<std::ptrdiff_t>(extra_leased_), extra_.end());
  out.put_size(queue.size());
  for (const std::int64_t rollout : queue) {
    out.put(rollout);
  }
  std::vector<std::pair<std::int64_t, std::int64_t>> failures(failures_.begin(), failures_.end());
  std::ranges::sort(failures);
  out.put_size(failures.size());
  for (const auto& [rollout, count] : failures) {
    out.put(rollout);
    out.put(count);
  }
  std::vector<std::int64_t> closed = closed_;
  std::ranges::sort(closed);
  out.put_size(closed.size());
  for (const std::int64_t serial : closed) {
    out.put(serial);
  }
  return seal(kMagic, kVersion, out.bytes());
}

std::unique_ptr<RolloutAllocator> RolloutAllocator::restore(std::string_view blob) {
  try {
    ByteReader in(unseal(kMagic, kVersion, blob));
    auto restored = std::make_unique<RolloutAllocator>(get_options(in));
    restored->read(in);
    return restored;
  } catch (const std::invalid_argument& reason) {
    throw std::invalid_argument(std::string("blob is not a snapshot that can be restored: ") + reason.what());
  }
}

void RolloutAllocator::read(ByteReader& in) {
  for (const auto counter : kCounters) {
    counts_.*counter = in.get<std::int64_t>();
    believe(counts_.*counter >= 0 && counts_.*counter < kLargestCounter, "a counter");
  }
  opened_ = in.get<std::int64_t>();
  initial_leased_ = in.get<std::int64_t>();
  spent_ = in.get<std::int64_t>();
  believe(opened_ >= 0 && opened_ < high_bits(std::numeric_limits<std::int64_t>::max(), index_bits_ + attempt_bits_),
          "the number of groups");
  believe(spent_ >= 0 && spent_ <= options_.total.value_or(0), "how much of the total is spent");
  const std::int64_t queued = read_groups(in);
  const std::int64_t window_start = first_serial_ * options_.initial;
  believe(initial_leased_ >= window_start && initial_leased_ <= opened_ * options_.initial, "the initial rollouts");
  read_queue(in, queued);
  read_failures(in);
  read_closed(in);
  believe(in.rest().empty(), "there is more");
}

// Returns the number of queued rollouts.
std::int64_t RolloutAllocator::read_groups(ByteReader& in) {
  const auto kind = in.get<std::uint8_t>();
  believe(kind < std::variant_size_v<decltype(ids_)>, "the kind of ids");
  if (kind == 1) {
    ids_ = std::make_unique<GroupIds<std::string>>();
  }
  const std::size_t size = in.get_size(sizeof(Group::asked));
  believe(std::cmp_less_equal(size, opened_), "the number of groups");
  first_serial_ = opened_ - static_cast<std::int64_t>(size);
  std::int64_t queued = 0;
  const auto in_range = [this](double value) {
    return value >= options_.lowest_reward && value <= options_.highest_reward;
  };
  const auto is_reward = [&](RolloutState state) {
    return in_range(state.reward()) || state.bits() == RolloutState::settled(kNan).bits();
  };
  std::visit(
      [&]<class Id>(std::unique_ptr<GroupIds<Id>>& ids) {
        for (std::size_t slot = 0; slot < size; ++slot) {
          Group& group = groups_.emplace_back();
          const auto asked = in.get<std::uint16_t>();
          if (asked == 0) {
            believe(slot > 0, "a drained group");
            ids->push_released();
            continue;
          }
          believe(std::int64_t{asked} >= options_.initial && std::int64_t{asked} <= options_.maximum,
                  "the size of a group");
          Id id{};
          get_id(in, id);
          believe(ids->push_back(std::move(id)), "an id that repeats");
          group.prior = in.get<double>();
          believe(std::isnan(group.prior) || in_range(group.prior), "a prior");
          group.ask(asked);
          group.require_room(asked);
          for (RolloutState& state : group.rollouts()) {
            state = RolloutState::from_bits(in.get<std::uint64_t>());
            believe(state.is_queued() || (state.is_settled() && is_reward(state)), "a reward");
            group.settled = static_cast<std::uint16_t>(group.settled + (state.is_settled() ? 1 : 0));
            queued += state.is_queued() ? 1 : 0;
          }
          ++counts_.open_groups;
        }
      },
      ids_);
  return queued;
}

// A queued rollout is either an initial rollout that was never leased, or is listed in the queue exactly once.
void RolloutAllocator::read_queue(ByteReader& in, std::int64_t queued) {
  std::vector<std::int64_t> sorted;
  for (std::size_t left = in.get_size(sizeof(std::int64_t)); left > 0; --left) {
    const auto rollout = in.get<std::int64_t>();
    believe(holds(rollout) && state_of(rollout).is_queued(), "the queue");
    extra_.push_back(rollout);
    sorted.push_back(rollout);
  }
  for (std::int64_t next = initial_leased_; next < opened_ * options_.initial; ++next) {
    const std::int64_t rollout = rollout_of(next / options_.initial, next % options_.initial);
    believe(holds(rollout) && state_of(rollout).is_queued(), "the initial rollouts");
    sorted.push_back(rollout);
  }
  std::ranges::sort(sorted);
  believe(std::ranges::adjacent_find(sorted) == sorted.end() && std::cmp_equal(sorted.size(), queued), "the queue");
}

void RolloutAllocator::read_failures(ByteReader& in) {
  for (std::size_t left = in.get_size(2 * sizeof(std::int64_t)); left > 0; --left) {
    const auto rollout = in.get<std::int64_t>();
    const auto count = in.get<std::int64_t>();
    believe(holds(rollout) && count >= 1 && count <= options_.max_attempts, "a failure");
    believe(count < options_.max_attempts || std::isnan(state_of(rollout).reward()), "a failure");
    believe(count < options_.max_attempts || state_of(rollout).is_settled(), "a failure");
    believe(failures_.emplace(rollout, count).second, "a failure");
  }
}

// A group whose rollouts have all settled is either closed or, with rule kTotal, a candidate for more.
void RolloutAllocator::read_closed(ByteReader& in) {
  for (std::size_t left = in.get_size(sizeof(std::int64_t)); left > 0; --left) {
    const auto serial = in.get<std::int64_t>();
    believe(serial >= (closed_.empty() ? first_serial_ : closed_.back() + 1) && serial < opened_, "a closed group");
    believe(group_of(serial).asked > 0 && group_of(serial).settled == group_of(serial).asked, "a closed group");
    close(serial);
  }
  auto closed = closed_.cbegin();
  for (std::int64_t serial = first_serial_; serial < opened_; ++serial) {
    Group& group = group_of(serial);
    if (closed != closed_.cend() && *closed == serial) {
      ++closed;
    } else if (group.asked > 0 && group.settled == group.asked) {
      believe(total_left() > 0 && std::int64_t{group.asked} < options_.maximum, "a group that is not closed");
      decide(serial, group);
    }
  }
}

}  // namespace v05
