#include "checks.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <ranges>
#include <sstream>
#include <stdexcept>

#include "buffers.hpp"
#include "v05/multiversion.hpp"
#include "v05/offenders.hpp"

namespace v05 {
namespace {

std::string range_text(const Options& options) {
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::digits10);
  text << "reward_range=(" << options.low << ", " << options.high << ')';
  return text.str();
}

// Whether no value is below the lowest or above the highest. NaN is neither.
V05_MULTIVERSION bool none_outside(const double* values, std::size_t count, double lowest, double highest) {
  unsigned outside = 0;
  for (std::size_t i = 0; i < count; ++i) {
    outside |= static_cast<unsigned>(values[i] < lowest) | static_cast<unsigned>(values[i] > highest);
  }
  return outside == 0;
}

// Whether every reward is in [low, high], so that none needs to be listed. NaN is not.
template <class Real>
V05_MULTIVERSION bool all_within(const Real* rewards, std::size_t rows, double low, double high) {
  unsigned outside = 0;
  for (std::size_t i = 0; i < rows; ++i) {
    const auto reward = static_cast<double>(rewards[i]);
    outside |= static_cast<unsigned>(!(reward >= low)) | static_cast<unsigned>(!(reward <= high));
  }
  return outside == 0;
}

// Squared differences of smaller rewards underflow, so that rewards that differ would have a deviation of 0. A larger
// eps keeps the divisor above 0.
template <class Real>
void check_smallest(const Outcomes<Real>& outcomes, const Options& options) {
  constexpr double kSmallest = 1e-130;  // neighbouring doubles of this size differ by 2e-146
  if (options.scale == Scale::kNone || options.scale == Scale::kMean || options.eps >= kSmallest) {
    return;
  }
  Offenders small;
  for (std::size_t i = 0; i < outcomes.rewards.size(); ++i) {
    const auto reward = static_cast<double>(outcomes.rewards[i]);
    if (outcomes.is_valid(i) && reward != 0.0 && std::abs(reward) < kSmallest) {
      small.add(i, reward);
    }
  }
  if (small.any()) {
    small.raise("rewards: nearer to 0 than 1e-130 in rows",
                "Give an eps above 0, or scale them up: their deviation, which divides them, would be rounded to 0.");
  }
}

template <class Mask>
void check_flags(std::span<const Mask> mask, std::size_t rows) {
  const std::size_t tokens = rows == 0 ? 0 : mask.size() / rows;
  Offenders odd;
  for (std::size_t row = 0; row < rows; ++row) {
    const auto of_row = mask.subspan(row * tokens, tokens);
    if (const auto first = std::ranges::find_if_not(of_row, is_flag<Mask>); first != of_row.end()) {
      odd.add(row, static_cast<double>(*first));
    }
  }
  if (odd.any()) {
    odd.raise("response_mask: neither 0 nor 1 in rows", "Give bool, True for a token to train on, as labels != -100.");
  }
}

}  // namespace

void check_offsets(const std::string& name, std::span<const std::int64_t> offsets, std::optional<std::int64_t> end) {
  if (!rise_from_zero(offsets)) {
    if (offsets.empty() || offsets.front() != 0) {
      throw std::invalid_argument(name + ": starts at " +
                                  (offsets.empty() ? "nothing" : std::to_string(offsets.front())) +
                                  "; the first offset is 0, and counts become offsets by "
                                  "numpy.r_[0, numpy.cumsum(counts)]");
    }
    const auto fall = std::ranges::adjacent_find(offsets, std::greater<>());
    throw std::invalid_argument(name + ": falls after position " + std::to_string(fall - offsets.begin()) +
                                "; sort it");
  }
  if (end && offsets.back() != *end) {
    const std::string last = std::to_string(offsets.back());
    throw std::invalid_argument(name == "group_offsets"
                                    ? name + ": ends at " + last + " for " + std::to_string(*end) +
                                          " rollouts; the last offset is N"
                                    : "out: shape (" + std::to_string(*end) + ",) for " + name + " that end at " +
                                          last + "; give a contiguous (" + last + ",) tensor");
  }
}

void check_prior(std::span<const double> prior, const Options& options) {
  Offenders outside;
  const double slack = options.rounding_slack();
  if (none_outside(prior.data(), prior.size(), options.low - slack, options.high + slack)) {
    return;
  }
  for (std::size_t g = 0; g < prior.size(); ++g) {
    if (prior[g] < options.low - slack || prior[g] > options.high + slack) {  // NaN is neither, and means no prior
      outside.add(g, prior[g]);
    }
  }
  if (outside.any()) {
    outside.raise("prior: outside " + range_text(options) + " in groups",
                  "Give priors in reward units, NaN for no prior, or pass the reward_range that holds them.");
  }
}

void check_energy(std::span<const double> energy, std::span<const std::uint8_t> valid) {
  Offenders bad;
  for (std::size_t i = 0; i < energy.size(); ++i) {
    const bool sound = energy[i] >= 0.0 && std::isfinite(energy[i]);
    if (!sound && (valid.empty() || valid[i] != 0)) {
      bad.add(i, energy[i]);
    }
  }
  if (bad.any()) {
    bad.raise("energy: negative or not finite in rows", "Give squared norms, at least 0, or mark the rows in valid=.");
  }
}

template <class Real>
bool check_rewards(const Outcomes<Real>& outcomes, const Options& options) {
  check_smallest(outcomes, options);
  constexpr double kLargest = 1e150;  // squares of such rewards are finite
  const double low = options.bounded() ? options.low - options.rounding_slack() : -kLargest;
  const double high = options.bounded() ? options.high + options.rounding_slack() : kLargest;
  if (all_within(outcomes.rewards.data(), outcomes.rewards.size(), low, high)) {
    return true;
  }
  Offenders broken;
  Offenders outside;
  for (std::size_t i = 0; i < outcomes.rewards.size(); ++i) {
    const auto reward = static_cast<double>(outcomes.rewards[i]);
    if (!outcomes.is_valid(i)) {
      continue;
    }
    if (!std::isfinite(reward)) {
      broken.add(i, reward);
    } else if (reward < low || reward > high) {
      outside.add(i, reward);
    }
  }
  if (broken.any() && !options.exclude_nonfinite) {
    broken.raise("rewards: not finite in rows",
                 "Mark them in valid=, or pass nonfinite='exclude' to leave them out and count them.");
  }
  if (outside.any() && options.bounded()) {
    outside.raise("rewards: outside " + range_text(options) + " in rows", "Pass the reward_range that holds them.");
  }
  if (outside.any()) {
    outside.raise("rewards: beyond 1e150 in rows", "Scale them down.");
  }
  return !broken.any();
}

template bool check_rewards<float>(const Outcomes<float>&, const Options&);
template bool check_rewards<double>(const Outcomes<double>&, const Options&);

void check_mask(const Buffer& mask, std::size_t rows) {
  with_mask(mask, [&]<class Mask>(std::span<const Mask> values) { check_flags(values, rows); });
}

}  // namespace v05
