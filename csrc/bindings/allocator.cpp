#include "v05/allocator.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "v05/fusion.hpp"
#include "v05/stopping.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
Array<T> to_array(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// Integer ids as an array, strings as a list.
py::object to_python(const v05::GroupIdList& ids) {
  if (const auto* integers = std::get_if<std::vector<std::int64_t>>(&ids)) {
    return to_array(*integers);
  }
  return py::cast(std::get<std::vector<std::string>>(ids));
}

using CalibrationNumbers = std::tuple<double, double, double, double, double, double>;

v05::Calibration to_calibration(const CalibrationNumbers& numbers) {
  const auto [alpha, beta, kappa, eps, delta0, delta1] = numbers;
  return {.alpha = alpha, .beta = beta, .kappa = kappa, .eps = eps, .delta0 = delta0, .delta1 = delta1};
}

// Runs C++ work without the interpreter lock, so that no thread waits for the allocator's mutex while it holds that
// lock. The work may then take the lock again while it holds the mutex.
template <class Work>
auto unlocked(Work&& work) {
  const py::gil_scoped_release release;
  return std::forward<Work>(work)();
}

}  // namespace

void register_allocator(py::module_& m) {
  using v05::RolloutAllocator;
  py::class_<RolloutAllocator>(m, "RolloutAllocator")
      .def(py::init([](const std::string& rule, std::int64_t initial, std::int64_t maximum, std::optional<double> cost,
                       std::optional<std::int64_t> total, std::optional<std::int64_t> chunk, std::int64_t seed,
                       std::pair<double, double> reward_range, const std::optional<CalibrationNumbers>& calibration,
                       std::int64_t max_attempts) {
             return std::make_unique<RolloutAllocator>(v05::AllocatorOptions{
                 .rule = v05::find_budget_rule(rule),
                 .initial = initial,
                 .maximum = maximum,
                 .cost = cost,
                 .total = total,
                 .chunk = chunk,
                 .seed = seed,
                 .lowest_reward = reward_range.first,
                 .highest_reward = reward_range.second,
                 .calibration = calibration ? std::optional(to_calibration(*calibration)) : std::nullopt,
                 .max_attempts = max_attempts,
             });
           }),
           py::kw_only(), py::arg("rule"), py::arg("initial"), py::arg("maximum"), py::arg("cost"), py::arg("total"),
           py::arg("chunk"), py::arg("seed"), py::arg("reward_range"), py::arg("calibration"), py::arg("max_attempts"))
      .def(
          "open",
          [](RolloutAllocator& self, const Array<std::int64_t>& group_ids, const Array<double>& priors,
             const Array<std::int64_t>& counts) {
            unlocked([&] {
              const auto ids = view(group_ids);
              self.open(std::vector<std::int64_t>(ids.begin(), ids.end()), view(priors), view(counts));
            });
          },
          py::arg("group_ids").noconvert(), py::arg("priors").noconvert(), py::arg("counts").noconvert())
      .def(
          "open",
          [](RolloutAllocator& self, const std::vector<std::string>& group_ids, const Array<double>& priors,
             const Array<std::int64_t>& counts) {
            unlocked([&] { self.open(group_ids, view(priors), view(counts)); });
          },
          py::arg("group_ids"), py::arg("priors").noconvert(), py::arg("counts").noconvert())
      .def(
          "lease",
          [](RolloutAllocator& self, std::int64_t limit, std::int64_t now) {
            const v05::Leases leases = unlocked([&] { return self.lease(limit, now); });
            return py::make_tuple(to_array(leases.lease_ids), to_python(leases.groups), to_array(leases.indices),
                                  to_array(leases.seeds));
          },
          py::arg("limit"), py::arg("now"))
      .def(
          "report",
          [](RolloutAllocator& self, const Array<std::int64_t>& lease_ids, const Array<double>& rewards) {
            unlocked([&] { self.report(view(lease_ids), view(rewards)); });
          },
          py::arg("lease_ids").noconvert(), py::arg("rewards").noconvert())
      .def(
          "fail",
          [](RolloutAllocator& self, const Array<std::int64_t>& lease_ids) {
            unlocked([&] { self.fail(view(lease_ids)); });
          },
          py::arg("lease_ids").noconvert())
      .def(
          "expire",
          [](RolloutAllocator& self, double older_than, std::int64_t now) {
            return unlocked([&] { return self.expire(older_than, now); });
          },
          py::arg("older_than"), py::arg("now"))
      .def(
          "would_ask",
          [](const RolloutAllocator& self, const Array<std::int64_t>& counts, const Array<std::int64_t>& successes,
             const Array<double>& priors) {
            return to_array(unlocked([&] { return self.would_ask(view(counts), view(successes), view(priors)); }));
          },
          py::arg("counts").noconvert(), py::arg("successes").noconvert(), py::arg("priors").noconvert())
      .def("done", [](const RolloutAllocator& self) { return unlocked([&] { return self.done(); }); })
      .def("counts",
           [](const RolloutAllocator& self) {
             const v05::AllocatorCounts counts = unlocked([&] { return self.counts(); });
             py::dict result;
             result["open_groups"] = counts.open_groups;
             result["closed_groups"] = counts.closed_groups;
             result["queued"] = counts.queued;
             result["leased"] = counts.leased;
             result["reported"] = counts.reported;
             result["failed"] = counts.failed;
             result["expired"] = counts.expired;
             result["invalid"] = counts.invalid;
             result["duplicate"] = counts.duplicate;
             result["late"] = counts.late;
             result["unknown"] = counts.unknown;
             return result;
           })
      .def("drain",
           [](RolloutAllocator& self) {
             py::object drained;
             unlocked([&] {
               self.drain([&](const v05::ClosedGroups& closed) {
                 const py::gil_scoped_acquire acquire;
                 drained = py::make_tuple(to_python(closed.group_ids), to_array(closed.offsets),
                                          to_array(closed.rewards), to_array(closed.priors));
               });
             });
             return drained;
           })
      .def("snapshot",
           [](const RolloutAllocator& self) { return py::bytes(unlocked([&] { return self.snapshot(); })); })
      .def_static(
          "restore",
          [](const py::bytes& blob) {
            const std::string_view bytes = blob;
            return unlocked([&] { return RolloutAllocator::restore(bytes); });
          },
          py::arg("blob"));

  m.def(
      "predicted_counts",
      [](const Array<double>& rates, std::int64_t total, std::int64_t lowest, std::int64_t highest) {
        return to_array(unlocked([&] { return v05::predicted_counts(view(rates), total, lowest, highest); }));
      },
      py::arg("rates").noconvert(), py::arg("total"), py::arg("lowest"), py::arg("highest"));

  m.def(
      "calibrated",
      [](std::int64_t count, double successes, double prior, const CalibrationNumbers& calibration) {
        const v05::Calibration known = to_calibration(calibration);
        const auto fusion = v05::calibrated(count, successes, v05::believe(prior, known));
        return py::make_tuple(fusion.baseline, fusion.variance, fusion.hallucination, v05::calibrated_gain(fusion),
                              v05::variance_gain(count, v05::gradient_variance(fusion, known)));
      },
      py::arg("count"), py::arg("successes"), py::arg("prior"), py::arg("calibration"));
}
