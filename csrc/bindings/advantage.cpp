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

#include "v05/grouping.hpp"
#include "v05/pages.hpp"

namespace py = pybind11;

namespace {

// v05.ops hands over addresses: to make NumPy arrays of a small batch's tensors costs more than its advantages. It has
// checked that what lies there is contiguous, of the dtype said here and of as many elements as the arguments say.
using Address = std::uintptr_t;
using MaybeAddress = std::optional<Address>;  // of what need not be given

template <class T>
std::span<T> view(const char* name, Address address, std::int64_t size) {
  if (address == 0 && size > 0) {
    throw std::invalid_argument(std::string(name) +
                                ": a tensor without memory of its own; give a plain one, as wait() or " +
                                "to_local() makes of those that collectives and DTensor return");
  }
  return {reinterpret_cast<T*>(address), static_cast<std::size_t>(size)};
}

template <class T>
std::span<T> view(const char* name, MaybeAddress address, std::int64_t size) {
  return address ? view<T>(name, *address, size) : std::span<T>{};
}

// Shared by number with v05.ops.
enum class Dtype { kNone = 0, kBytes = 1, kInt64 = 2, kFloat32 = 3, kFloat64 = 4, kInt32 = 5 };

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
    case Dtype::kInt32:
      body.template operator()<std::int32_t>();
      break;
    case Dtype::kFloat32:
      body.template operator()<float>();
      break;
    case Dtype::kFloat64:
      body.template operator()<double>();
      break;
    default:
      body.template operator()<std::uint8_t>();
  }
}

// The rows of v05.ops.AdvantageStats.table; those that the baseline does not define are empty.
v05::StatisticsOut statistics_of(v05::Baseline baseline, std::int64_t groups, Address table) {
  const bool shrinkage = baseline == v05::Baseline::kShrinkage;
  const bool calibrated = baseline == v05::Baseline::kCalibrated;
  const auto row = [&](std::int64_t i, bool defined) {
    return defined ? std::span(reinterpret_cast<double*>(table) + i * groups, static_cast<std::size_t>(groups))
                   : std::span<double>{};
  };
  return {.count = row(0, true),
          .nonfinite = row(1, true),
          .clipped = row(2, true),
          .mean = row(3, true),
          .variance = row(4, true),
          .baseline = row(5, true),
          .mse = row(6, shrinkage || calibrated),
          .weight = row(7, shrinkage),
          .statistic = row(8, shrinkage),
          .p_value = row(9, shrinkage),
          .hallucination = row(7, calibrated),
          .take_more = row(calibrated ? 8 : 10, shrinkage || calibrated)};
}

// Offsets of parts that lie one after another from 0 on, to `end` where it is known.
void check_offsets(const std::string& name, std::span<const std::int64_t> values, std::optional<std::int64_t> end) {
  if (!v05::rise_from_zero(values)) {
    if (values.empty() || values.front() != 0) {
      throw std::invalid_argument(name + ": starts at " +
                                  (values.empty() ? "nothing" : std::to_string(values.front())) +
                                  "; the first offset is 0");
    }
    const auto fall = std::adjacent_find(values.begin(), values.end(), std::greater<>());
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

void fused_advantage(Address rewards, int rewards_dtype, bool token_rewards, std::int64_t rows, MaybeAddress offsets,
                     MaybeAddress ids, std::int64_t num_groups, MaybeAddress prior, MaybeAddress mask, int mask_dtype,
                     MaybeAddress cu_seqlens, MaybeAddress valid, MaybeAddress trajectory_ids, Address out,
                     int out_dtype, std::int64_t out_size, Address table, int threads, bool stats, int baseline,
                     int scale, bool leave_one_out, bool raw_singleton, bool exclude_nonfinite, double low, double high,
                     double eps, std::int64_t max_rollouts, double cost, const std::array<double, 4>& calibration) {
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
  using Integers = const std::int64_t;
  const v05::Groups groups{.offsets = view<Integers>("group_offsets", offsets, offsets ? num_groups + 1 : 0),
                           .ids = view<Integers>("group_ids", ids, rows),
                           .count = num_groups};
  const std::span<Integers> starts = view<Integers>("cu_seqlens", cu_seqlens, rows + 1);
  const auto priors = view<const double>("prior", prior, num_groups);
  const auto are_valid = view<const std::uint8_t>("valid", valid, rows);
  const auto trajectories = view<Integers>("trajectory_ids", trajectory_ids, rows);
  if (!groups.offsets.empty()) {
    check_offsets("group_offsets", groups.offsets, rows);
  }
  if (!starts.empty()) {
    check_offsets("cu_seqlens", starts, out_size);
  }
  const v05::StatisticsOut statistics = statistics_of(rule.baseline, stats ? num_groups : 0, table);

  const auto compute = [&]<class Real, class Out>(std::span<const Real> outcomes, std::span<Out> advantages) {
    const v05::Rollouts<Real> rollouts{.rewards = outcomes, .valid = are_valid, .trajectory_ids = trajectories};
    v05::compute_advantages(rollouts, groups, priors, rule, advantages, statistics, threads);
  };
  const auto mask_of = [&]<class Mask>() { return view<const Mask>("response_mask", mask, out_size); };
  // From rewards of either kind.
  const auto compute_rollouts = [&]<class Out>(std::span<Out> advantages) {
    with_real(Dtype{rewards_dtype}, [&]<class Real>() {
      if (!token_rewards) {
        compute(view<const Real>("rewards", rewards, rows), advantages);
        return;
      }
      std::vector<double> outcomes(static_cast<std::size_t>(rows));
      with_mask(Dtype{mask_dtype}, [&]<class Mask>() {
        v05::sum_tokens(view<const Real>("rewards", rewards, out_size), mask_of.template operator()<Mask>().data(),
                        std::span(outcomes), threads);
      });
      compute(std::span<const double>(outcomes), advantages);
    });
  };
  // To any layout.
  const auto compute_into = [&]<class Out>() {
    const std::span<Out> to = view<Out>("out", out, out_size);
    v05::prefer_huge_pages(to);
    if (!mask && starts.empty()) {
      compute_rollouts(to);
      return;
    }
    std::vector<Out> advantages(static_cast<std::size_t>(rows));
    try {
      compute_rollouts(std::span(advantages));
    } catch (const std::invalid_argument&) {  // rewards are summed over the mask, which is then the one at fault
      if (mask) {
        with_mask(Dtype{mask_dtype}, [&]<class Mask>() {
          v05::check_mask(mask_of.template operator()<Mask>(), static_cast<std::size_t>(rows));
        });
      }
      throw;
    }
    const std::span<const Out> from(advantages);
    if (mask) {
      with_mask(Dtype{mask_dtype}, [&]<class Mask>() {
        v05::spread_padded(from, mask_of.template operator()<Mask>().data(), to, threads);
      });
    } else {
      v05::spread_packed(from, starts, to, threads);
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
  m.def(
      "check_mask",
      [](Address mask, int dtype, std::int64_t rows, std::int64_t size) {
        with_mask(Dtype{dtype}, [&]<class Mask>() {
          v05::check_mask(view<const Mask>("response_mask", mask, size), static_cast<std::size_t>(rows));
        });
      },
      py::arg("mask"), py::arg("dtype"), py::arg("rows"), py::arg("size"));
  // By position only: names would cost more than the advantages of a small batch.
  m.def("fused_advantage", &fused_advantage);
}
