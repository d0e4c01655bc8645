#include "groups.hpp"

#include <limits>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "v05/group_ids.hpp"

namespace v05 {
namespace {

// The same trajectory id in two groups means two trajectories.
struct TrajectoryHash {
  std::size_t operator()(const std::pair<std::size_t, std::int64_t>& key) const {
    return mix(mix(key.first) ^ static_cast<std::uint64_t>(key.second));
  }
};

}  // namespace

template <class Real>
std::vector<std::uint8_t> first_of_trajectories(const Outcomes<Real>& outcomes, const Groups& groups) {
  std::vector<std::uint8_t> is_first(outcomes.trajectory_ids.size());
  std::unordered_map<std::pair<std::size_t, std::int64_t>, std::size_t, TrajectoryHash> first_rows;
  for_rows(is_first.size(), groups, [&](std::size_t row, std::size_t group) {
    if (!outcomes.is_usable(row)) {
      return;
    }
    const auto [entry, is_new] = first_rows.try_emplace({group, outcomes.trajectory_ids[row]}, row);
    const std::size_t first = entry->second;
    is_first[row] = static_cast<std::uint8_t>(is_new);
    if (outcomes.rewards[first] != outcomes.rewards[row]) {
      std::ostringstream message;
      message.precision(std::numeric_limits<double>::digits10);
      message << "trajectory_ids: rows " << first << " and " << row << " are one trajectory ("
              << outcomes.trajectory_ids[row] << ") with two rewards (" << outcomes.rewards[first] << ", "
              << outcomes.rewards[row] << "). Give every row of a trajectory the trajectory's reward.";
      throw std::invalid_argument(message.str());
    }
  });
  return is_first;
}

template std::vector<std::uint8_t> first_of_trajectories(const Outcomes<float>&, const Groups&);
template std::vector<std::uint8_t> first_of_trajectories(const Outcomes<double>&, const Groups&);

}  // namespace v05
