// What is refused before anything changes: std::invalid_argument that names the argument, the rows and the remedy.
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

// Of rollouts and of attempts. Keeps lease numbers within 63 bits for the first two billion groups.
inline constexpr std::int64_t kLargestCount = 65535;

// Throws std::invalid_argument with the parts as one text.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::digits10);
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Rows for a message, the first few of many.
std::string row_list(std::span<const std::int64_t> rows);

// Rewards or priors outside the reward range. NaN is admitted: no prior, no reward.
void require_in_range(std::string_view name, std::span<const double> values, const AllocatorOptions& options);

}  // namespace v05
