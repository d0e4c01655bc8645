#include "v05/advantage.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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
using MaskArray = std::variant<Array<std::uint8_t>, Array<std::int64_t>, Array<float>>;

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

v05::StatisticsOut statistics_out(MaybeArray<double>& moments, MaybeArray<std::int64_t>& count,
                                  MaybeArray<bool>& take_more) {
  if (!moments || !count || !take_more) {
    return {};
  }
  const auto groups = static_cast<std::size_t>(count->size());
  if (static_cast<std::size_t>(moments->size()) != 7 * groups ||
      static_cast<std::size_t>(take_more->size()) != groups) {
    throw std::invalid_argument("statistics buffers: expected (7, G) float64, (G,) int64 and (G,) bool");
  }
  const std::span<double> all = mutable_view(*moments);
  const auto part = [&](std::size_t i) { return all.subspan(i * groups, groups); };
  return {.count = mutable_view(*count),
          .mean = part(0),
          .variance = part(1),
          .baseline = part(2),
          .weight = part(3),
          .statistic = part(4),
          .p_value = part(5),
          .mse = part(6),
          .take_more = mutable_view(*take_more)};
}

// Offsets of parts that lie one after another from 0 on; where they end is the caller's to judge.
void check_offsets(const std::string& name, const Array<std::int64_t>& offsets) {
  const std::span<const std::int64_t> values = view(offsets);
  if (values.empty() || values.front() != 0) {
    throw std::invalid_argument(name + ": starts at " + (values.empty() ? "nothing" : std::to_string(values.front())) +
                                "; the first offset is 0");
  }
  const auto fall = std::adjacent_find(values.begin(), values.end(), std::greater<>());
  if (fall != values.end()) {
    throw std::invalid_argument(name + ": falls after position " + std::to_string(fall - values.begin()) + "; sort it");
  }
}

std::int64_t fused_advantage(const RealArray& rewards, const Array<std::int64_t>& offsets,
                             const MaybeArray<std::int64_t>& order, const MaybeArray<double>& prior,
                             const std::optional<MaskArray>& mask, const MaybeArray<std::int64_t>& cu_seqlens,
                             const MaybeArray<bool>& valid, const MaybeArray<std::int64_t>& trajectory_ids,
                             RealArray& out, MaybeArray<double> moments, MaybeArray<std::int64_t> count,
                             MaybeArray<bool> take_more, int baseline, int scale, bool leave_one_out,
                             bool raw_singleton, bool exclude_nonfinite, double low, double high, double eps,
                             std::int64_t max_rollouts, double cost, int threads) {
  const v05::AdvantageRule rule{.baseline = static_cast<v05::Baseline>(baseline),
                                .scale = static_cast<v05::Scale>(scale),
                                .leave_one_out = leave_one_out,
                                .raw_singleton = raw_singleton,
                                .exclude_nonfinite = exclude_nonfinite,
                                .low = low,
                                .high = high,
                                .eps = eps,
                                .max_rollouts = max_rollouts,
                                .cost = cost};
  const v05::StatisticsOut statistics = statistics_out(moments, count, take_more);
  const v05::Groups groups{.offsets = view(offsets), .order = view(order)};
  const auto rows = static_cast<std::size_t>(std::visit([](const auto& array) { return array.shape(0); }, rewards));
  v05::TokenSteps steps;

  const auto compute = [&]<class Real, class Out>(std::span<const Real> outcomes, std::span<Out> advantages) {
    const v05::Rollouts<Real> rollouts{
        .rewards = outcomes,
        .valid = {reinterpret_cast<const std::uint8_t*>(view(valid).data()), view(valid).size()},
        .trajectory_ids = view(trajectory_ids)};
    return v05::compute_advantages(rollouts, groups, view(prior), rule, advantages, statistics, steps, threads);
  };
  // From rewards of either kind to an advantage a rollout.
  const auto compute_rollouts = [&]<class Out>(std::span<Out> advantages) {
    return std::visit(
        [&](const auto& array) {
          if (array.ndim() == 1) {
            return compute(view(array), advantages);
          }
          std::vector<double> outcomes(rows);
          const auto tokens = static_cast<std::size_t>(array.shape(1));
          std::visit(
              [&](const auto& m) {
                steps.sum = [&outcomes, tokens, from = array.data(), mask_data = m.data()](std::size_t row) {
                  outcomes[row] = v05::sum_row(from + row * tokens, mask_data + row * tokens, tokens);
                };
              },
              mask.value());
          steps.tokens = static_cast<std::int64_t>(rows * tokens);
          return compute(std::span<const double>(outcomes), advantages);
        },
        rewards);
  };

  const py::gil_scoped_release release;
  return std::visit(
      [&]<class Out>(Array<Out>& array) {
        v05::prefer_huge_pages(mutable_view(array));
        if (!mask && !cu_seqlens) {
          return compute_rollouts(mutable_view(array));
        }
        std::vector<double> advantages(rows);
        Out* const to = array.mutable_data();
        if (mask) {
          const auto tokens = rows == 0 ? 0 : static_cast<std::size_t>(array.size()) / rows;
          std::visit(
              [&](const auto& m) {
                steps.spread = [&advantages, tokens, to, mask_data = m.data()](std::size_t row) {
                  v05::spread_row(static_cast<Out>(advantages[row]), mask_data + row * tokens, tokens,
                                  to + row * tokens);
                };
              },
              *mask);
        } else {
          steps.spread = [&advantages, to, starts = cu_seqlens->data()](std::size_t row) {
            const auto tokens = static_cast<std::size_t>(starts[row + 1] - starts[row]);
            v05::fill_row(static_cast<Out>(advantages[row]), tokens, to + starts[row]);
          };
        }
        steps.tokens = array.size();
        return compute_rollouts(std::span<double>(advantages));
      },
      out);
}

}  // namespace

void register_advantage(py::module_& m) {
  m.def("check_offsets", &check_offsets, py::arg("name"), py::arg("offsets").noconvert());
  m.def("fused_advantage", &fused_advantage, py::arg("rewards").noconvert(), py::arg("offsets").noconvert(),
        py::arg("order").noconvert(), py::arg("prior").noconvert(), py::arg("mask").noconvert(),
        py::arg("cu_seqlens").noconvert(), py::arg("valid").noconvert(), py::arg("trajectory_ids").noconvert(),
        py::arg("out").noconvert(), py::arg("moments").noconvert(), py::arg("count").noconvert(),
        py::arg("take_more").noconvert(), py::kw_only(), py::arg("baseline"), py::arg("scale"),
        py::arg("leave_one_out"), py::arg("raw_singleton"), py::arg("exclude_nonfinite"), py::arg("low"),
        py::arg("high"), py::arg("eps"), py::arg("max_rollouts"), py::arg("cost"), py::arg("threads"));
}
