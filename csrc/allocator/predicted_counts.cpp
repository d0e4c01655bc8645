#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "checks.hpp"
#include "v05/allocator.hpp"
#include "v05/stopping.hpp"

namespace v05 {

std::vector<std::int64_t> predicted_counts(std::span<const double> rates, std::int64_t total, std::int64_t lowest,
                                           std::int64_t highest) {
  const auto groups = static_cast<std::int64_t>(rates.size());
  if (lowest < 1 || highest < lowest || highest > kLargestCount) {
    refuse("lowest=", lowest, " and highest=", highest, " are not 1 <= lowest <= highest <= ", kLargestCount,
           "; the paper's are 2 and 128");
  }
  if (total < 0 || (groups > 0 && total / groups < lowest)) {  // groups * lowest may overflow
    refuse("total=", total, " does not hold lowest=", lowest, " rollouts for each of ", groups,
           " groups; raise it, or give fewer groups");
  }
  struct Next {
    double gain;
    std::int64_t group;
    bool operator<(const Next& other) const { return gain != other.gain ? gain < other.gain : group > other.group; }
  };
  std::vector<std::int64_t> counts(rates.size(), lowest);
  const auto gain_of = [&](std::int64_t group) {
    const auto g = static_cast<std::size_t>(group);
    const double rate = std::isnan(rates[g]) ? 0.5 : rates[g];
    return predicted_utility(counts[g] + 1, rate) - predicted_utility(counts[g], rate);
  };
  std::vector<Next> heap;
  for (std::int64_t group = 0; group < groups; ++group) {
    if (const double rate = rates[static_cast<std::size_t>(group)]; rate < 0.0 || rate > 1.0) {
      refuse("rates[", group, "]=", rate, " is outside [0, 1]; scale predictions, or pass NaN where there is none");
    }
    if (lowest < highest) {
      heap.push_back({.gain = gain_of(group), .group = group});
    }
  }
  std::ranges::make_heap(heap, std::less{});
  for (std::int64_t left = total - (groups * lowest); left > 0 && !heap.empty() && heap.front().gain > 0.0; --left) {
    std::ranges::pop_heap(heap, std::less{});
    const std::int64_t group = heap.back().group;
    heap.pop_back();
    if (++counts[static_cast<std::size_t>(group)] < highest) {
      heap.push_back({.gain = gain_of(group), .group = group});
      std::ranges::push_heap(heap, std::less{});
    }
  }
  return counts;
}

}  // namespace v05
