#include "v05/advantage.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "v05/pages.hpp"

namespace py = pybind11;

namespace {

// v05.ops hands over C-contiguous arrays of the right dtype; anything else fails the overload instead of being copied.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using MaybeArray = std::optional<Array<T>>;
using RealArray = std::variant<Array<float>, Array<double>>;
using MaskArray = std::variant<Array<bool>, Array<std::uint8_t>, Array<std::int64_t>, Array<float>>;

template <class T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
std::span<const T> view(const MaybeArray<T>& array) {
  return array ? view(*array) : std::span<const T>{};
}

template <class T>
std::span<T> mutable_view(Array<T>& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

template <class T>
const T* mask_data(const Array<T>& mask) {
  return mask.data();
}

const std::uint8_t* mask_data(const Array<bool>& mask) { return reinterpret_cast<const std::uint8_t*>(mask.data()); }

// What v05.ops.AdvantageStats is made of: counts (2 + G,) of non-finite rewards, clipped ones (never: they are refused)
// and each group's rollouts; moments (3, G), more where the baseline defines more; take_more (G,) or (0,). Of no group
// where statistics are not wanted.
struct Statistics {
  static constexpr py::ssize_t kMeans = 3;  // mean, variance, baseline
  v05::Baseline baseline;
  py::ssize_t groups;
  Array<std::int64_t> counts;
  Array<double> moments;
  Array<bool> take_more;

  Statistics(py::ssize_t wanted, v05::Baseline rule)
      : baseline(rule),
        groups(wanted),
        counts(2 + wanted),
        moments({rows(), wanted}),
        take_more(rows() > kMeans ? wanted : 0) {
    std::fill_n(counts.mutable_data(), 2, 0);
  }

  // Of moments. Those of kShrinkage after mse are weight, statistic and p_value, that of kCalibrated is hallucination.
  [[nodiscard]] py::ssize_t rows() const {
    return baseline == v05::Baseline::kShrinkage ? 7 : baseline == v05::Baseline::kCalibrated ? 5 : kMeans;
  }

  v05::StatisticsOut out() {
    const std::span<double> all = mutable_view(moments);
    const auto size = static_cast<std::size_t>(groups);
    const auto row = [&](std::size_t i) {
      return size * i < all.size() ? all.subspan(size * i, size) : std::span<double>{};
    };
    return {.count = mutable_view(counts).subspan(2),
            .mean = row(0),
            .variance = row(1),
            .baseline = row(2),
            .mse = row(3),
            .weight = row(4),
            .statistic = row(5),
            .p_value = row(6),
            .hallucination = row(4),
            .take_more = mutable_view(take_more)};
  }
};

// Offsets of parts that lie one after another from 0 on, to `end` where it is known.
void check_offsets(const std::string& name, const Array<std::int64_t>& offsets, std::optional<std::int64_t> end) {
  const std::span<const std::int64_t> values = view(offsets);
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

py::tuple fused_advantage(const RealArray& rewards, const MaybeArray<std::int64_t>& offsets,
                          const MaybeArray<std::int64_t>& ids, std::int64_t num_groups, const MaybeArray<double>& prior,
                          const std::optional<MaskArray>& mask, const MaybeArray<std::int64_t>& cu_seqlens,
                          const MaybeArray<bool>& valid, const MaybeArray<std::int64_t>& trajectory_ids, RealArray& out,
                          int threads, bool stats, int baseline, int scale, bool leave_one_out, bool raw_singleton,
                          bool exclude_nonfinite, double low, double high, double eps, std::int64_t max_rollouts,
                          double cost, const std::array<double, 4>& calibration) {
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
  const auto rows = static_cast<std::size_t>(std::visit([](const auto& array) { return array.shape(0); }, rewards));
  if (offsets) {
    check_offsets("group_offsets", *offsets, static_cast<std::int64_t>(rows));
  }
  if (cu_seqlens) {
    check_offsets("cu_seqlens", *cu_seqlens, std::visit([](const auto& array) { return array.size(); }, out));
  }
  Statistics statistics(stats ? num_groups : 0, rule.baseline);
  const v05::StatisticsOut statistics_out = statistics.out();
  const v05::Groups groups{.offsets = view(offsets), .ids = view(ids), .count = num_groups};

  const auto compute = [&]<class Real, class Out>(std::span<const Real> outcomes, std::span<Out> advantages) {
    const v05::Rollouts<Real> rollouts{
        .rewards = outcomes,
        .valid = {reinterpret_cast<const std::uint8_t*>(view(valid).data()), view(valid).size()},
        .trajectory_ids = view(trajectory_ids)};
    return v05::compute_advantages(rollouts, groups, view(prior), rule, advantages, statistics_out, threads);
  };
  // From rewards of either kind.
  const auto compute_rollouts = [&]<class Out>(std::span<Out> advantages) {
    return std::visit(
        [&](const auto& array) {
          if (array.ndim() == 1) {
            return compute(view(array), advantages);
          }
          std::vector<double> outcomes(rows);
          std::visit([&](const auto& m) { v05::sum_tokens(view(array), mask_data(m), std::span(outcomes), threads); },
                     mask.value());
          return compute(std::span<const double>(outcomes), advantages);
        },
        rewards);
  };
  // To any layout.
  const auto compute_into = [&]<class Out>(Array<Out>& array) {
    const std::span<Out> to = mutable_view(array);
    v05::prefer_huge_pages(to);
    if (!mask && !cu_seqlens) {
      return compute_rollouts(to);
    }
    std::vector<Out> advantages(rows);
    const std::int64_t left_out = compute_rollouts(std::span(advantages));
    const std::span<const Out> from(advantages);
    if (mask) {
      std::visit([&](const auto& m) { v05::spread_padded(from, mask_data(m), to, threads); }, *mask);
    } else {
      v05::spread_packed(from, cu_seqlens->data(), to, threads);
    }
    return left_out;
  };

  std::int64_t* const nonfinite = statistics.counts.mutable_data();
  {
    const py::gil_scoped_release release;
    *nonfinite = std::visit(compute_into, out);
  }
  return py::make_tuple(statistics.counts, statistics.moments, statistics.take_more);
}

}  // namespace

void register_advantage(py::module_& m) {
  m.def("check_offsets", &check_offsets, py::arg("name"), py::arg("offsets").noconvert(), py::arg("end"));
  // By position only: names would cost more than the advantages of a small batch.
  m.def("fused_advantage", &fused_advantage, py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(),
        py::arg(), py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg().noconvert(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg());
}
