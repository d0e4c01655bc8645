#include "checks.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "v05/fusion.hpp"

namespace v05 {

std::string row_list(std::span<const std::int64_t> rows) {
  constexpr std::size_t kShown = 8;
  std::ostringstream text;
  text << (rows.size() == 1 ? "row " : "rows ");
  for (std::size_t i = 0; i < std::min(rows.size(), kShown); ++i) {
    text << (i == 0 ? "" : ", ") << rows[i];
  }
  if (rows.size() > kShown) {
    text << " and " << rows.size() - kShown << " more";
  }
  return text.str();
}

void require_in_range(std::string_view name, std::span<const double> values, const AllocatorOptions& options) {
  const double slack = rounding_slack(options.lowest_reward, options.highest_reward);
  std::vector<std::int64_t> rows;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < options.lowest_reward - slack || values[i] > options.highest_reward + slack) {
      rows.push_back(static_cast<std::int64_t>(i));
    }
  }
  if (!rows.empty()) {
    refuse(name, " outside reward_range=(", options.lowest_reward, ", ", options.highest_reward, ") in ",
           row_list(rows), " (the first is ", values[static_cast<std::size_t>(rows.front())],
           "); widen reward_range, or pass NaN where there is no value");
  }
}

}  // namespace v05
