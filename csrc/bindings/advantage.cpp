#include "v05/advantage.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "v05/pages.hpp"

namespace py = pybind11;

namespace {

// v05.ops hands over addresses: to make NumPy arrays of a small batch's tensors costs more than its advantages. It has
// checked that what lies there is contiguous, of the dtype said here and of as many elements as the arguments say.
template <class T>
std::span<const T> view(std::uintptr_t address, std::int64_t size) {
  return {reinterpret_cast<const T*>(address), address == 0 ? 0 : static_cast<std::size_t>(size)};
}

template <class T>
std::span<T> mutable_view(std::uintptr_t address, std::int64_t size) {
  return {reinterpret_cast<T*>(address), static_cast<std::size_t>(size)};
}

// Shared by number with v05.ops.
enum class Dtype { kNone = 0, kBytes = 1, kInt64 = 2, kFloat32 = 3, kFloat64 = 4 };

template <class Body>
void with_real(Dtype dtype, const Body& body) {
  dtype == Dtype::kFloat32 ? body.template operator()<float>() : body.template operator()<double>();
}

template <class Body>
void with_mask(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kInt64:
      body.template operator()<std::int64_t>();
      break;
    case Dtype::kFloat32:
      body.template operator()<float>();
      break;
    default:
      body.template operator()<std::uint8_t>();
  }
}

// The rows of v05.ops.AdvantageStats.table, which a baseline defines the first 6, 9 or 11 of.
v05::StatisticsOut statistics_of(v05::Baseline baseline, std::int64_t groups, std::uintptr_t table) {
  const auto size = static_cast<std::uintptr_t>(groups);
  const auto row = [&](std::uintptr_t i) { return mutable_view<double>(table + i * size * sizeof(double), groups); };
  return {.count = row(0),
          .nonfinite = row(1),
          .clipped = row(2),
          .mean = row(3),
          .variance = row(4),
          .baseline = row(5),
          .mse = row(6),
          .weight = row(7),
          .statistic = row(8),
          .p_value = row(9),
          .hallucination = row(7),
          .take_more = row(baseline == v05::Baseline::kCalibrated ? 8 : 10)};
}

// Offsets of parts that lie one after another from 0 on, to `end` where it is known.
void check_offsets(const std::string& name, std::span<const std::int64_t> values, std::optional<std::int64_t> end) {
  if (values.empty() || values.front() != 0) {
    throw std::invalid_argument(name + ": starts at " + (values.empty() ? "nothing" : std::to_string(values.front())) +
                                "; the first offset is 0");
  }
  const auto fall = std::adjacent_find(values.begin(), values.end(), std::greater<>());
  if (fall != values.end()) {
    throw std::invalid_argument(name + ": falls after position " + std::to_string(fall - values.begin()) + "; sort it");
  }
  if (end && values.back() != *end) {
    const std::string last = std::to_string(values.back());
    throw std::invalid_argument(name == "group_offsets"
                                    ? name + ": ends at " + last + " for " + std::to_string(*end) +
                                          " rollouts; the last offset is N"
                                    : "out: shape (" + std::to_string(*end) + ",) for " + name + " that end at " +
                                          last + "; give a contiguous (" + last + ",) tensor");
  }
}

// Addresses of optional arguments are 0 where they are not given, and may be where they are empty.
void fused_advantage(std::uintptr_t rewards, int rewards_dtype, bool token_rewards, std::int64_t rows,
                     std::uintptr_t offsets, std::uintptr_t ids, std::int64_t num_groups, std::uintptr_t prior,
                     std::uintptr_t mask, int mask_dtype, std::uintptr_t cu_seqlens, std::uintptr_t valid,
                     std::uintptr_t trajectory_ids, std::uintptr_t out, int out_dtype, std::int64_t out_size,
                     std::uintptr_t table, int threads, bool stats, int baseline, int scale, bool leave_one_out,
                     bool raw_singleton, bool exclude_nonfinite, double low, double high, double eps,
                     std::int64_t max_rollouts, double cost, const std::array<double, 4>& calibration) {
  const v05::AdvantageRule rule{
      .baseline = static_cast<v05::Baseline>(baseline),
      .scale = static_cast<v05::Scale>(scale),
      .leave_one_out = leave_one_out,
      .raw_singleton = raw_singleton,
      .exclude_nonfinite = exclude_nonfinite,
      .low = low,
      .high = high,
      .eps = eps,
      .max_rollouts = max_rollouts,
      .cost = cost,
      .calibration = {.alpha = calibration[0], .beta = calibration[1], .kappa = calibration[2], .eps = calibration[3]}};
  const v05::Groups groups{.offsets = view<std::int64_t>(offsets, num_groups + 1),
                           .ids = view<std::int64_t>(ids, rows),
                           .count = num_groups};
  const std::span<const std::int64_t> starts = view<std::int64_t>(cu_seqlens, rows + 1);
  if (!groups.offsets.empty()) {
    check_offsets("group_offsets", groups.offsets, rows);
  }
  if (!starts.empty()) {
    check_offsets("cu_seqlens", starts, out_size);
  }
  const v05::StatisticsOut statistics = statistics_of(rule.baseline, stats ? num_groups : 0, table);

  const auto compute = [&]<class Real, class Out>(std::span<const Real> outcomes, std::span<Out> advantages) {
    const v05::Rollouts<Real> rollouts{.rewards = outcomes,
                                       .valid = view<std::uint8_t>(valid, rows),
                                       .trajectory_ids = view<std::int64_t>(trajectory_ids, rows)};
    v05::compute_advantages(rollouts, groups, view<double>(prior, num_groups), rule, advantages, statistics, threads);
  };
  // From rewards of either kind.
  const auto compute_rollouts = [&]<class Out>(std::span<Out> advantages) {
    with_real(Dtype{rewards_dtype}, [&]<class Real>() {
      if (!token_rewards) {
        compute(view<Real>(rewards, rows), advantages);
        return;
      }
      std::vector<double> outcomes(static_cast<std::size_t>(rows));
      with_mask(Dtype{mask_dtype}, [&]<class Mask>() {
        v05::sum_tokens(view<Real>(rewards, out_size), view<Mask>(mask, out_size).data(), std::span(outcomes), threads);
      });
      compute(std::span<const double>(outcomes), advantages);
    });
  };
  // To any layout.
  const auto compute_into = [&]<class Out>() {
    const std::span<Out> to = mutable_view<Out>(out, out_size);
    v05::prefer_huge_pages(to);
    if (Dtype{mask_dtype} == Dtype::kNone && starts.empty()) {
      compute_rollouts(to);
      return;
    }
    std::vector<Out> advantages(static_cast<std::size_t>(rows));
    compute_rollouts(std::span(advantages));
    const std::span<const Out> from(advantages);
    if (starts.empty()) {
      with_mask(Dtype{mask_dtype},
                [&]<class Mask>() { v05::spread_padded(from, view<Mask>(mask, out_size).data(), to, threads); });
    } else {
      v05::spread_packed(from, starts.data(), to, threads);
    }
  };

  const py::gil_scoped_release release;
  with_real(Dtype{out_dtype}, compute_into);
}

}  // namespace

void register_advantage(py::module_& m) {
  m.def(
      "check_offsets",
      [](const std::string& name, const py::array_t<std::int64_t, py::array::c_style>& offsets,
         std::optional<std::int64_t> end) {
        check_offsets(name, {offsets.data(), static_cast<std::size_t>(offsets.size())}, end);
      },
      py::arg("name"), py::arg("offsets").noconvert(), py::arg("end"));
  // By position only: names would cost more than the advantages of a small batch.
  m.def("fused_advantage", &fused_advantage);
}
