// Checks of the arguments. They throw std::invalid_argument, which names the argument, the rows and the remedy, before
// anything changes.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "v05/allocator.hpp"

namespace v05 {

// The limit on rollouts of a group and on attempts. With it lease ids fit 63 bits for the first two billion groups.
inline constexpr std::int64_t kLargestCount = 65535;

// Throws std::invalid_argument with the parts as its text.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::digits10);
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Rows for a message; only the first few if there are many.
std::string row_list(std::span<const std::int64_t> rows);

// Throws if rewards or priors are outside the reward range. NaN, which means no reward or no prior, is allowed.
void require_in_range(std::string_view name, std::span<const double> values, const AllocatorOptions& options);

}  // namespace v05
