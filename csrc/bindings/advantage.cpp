#include "v05/advantage.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../advantage/checks.hpp"

namespace py = pybind11;

namespace {

// v05.ops passes addresses, because making NumPy arrays of a small batch's tensors costs more than its advantages. It
// has checked that the tensors are contiguous and have the dtype and the number of elements that the arguments say.
using Address = std::uintptr_t;
using MaybeAddress = std::optional<Address>;  // of an optional argument

void* memory(const char* name, Address address, std::size_t size) {
  if (address == 0 && size > 0) {
    throw std::invalid_argument(std::string(name) +
                                ": a tensor without memory of its own; give a plain one, as wait() or " +
                                "to_local() makes of those that collectives and DTensor return");
  }
  return reinterpret_cast<void*>(address);
}

template <class T>
std::span<const T> view(const char* name, MaybeAddress address, std::size_t size) {
  return address ? std::span<const T>(static_cast<const T*>(memory(name, *address, size)), size) : std::span<const T>{};
}

v05::Buffer buffer(const char* name, MaybeAddress address, int dtype, std::size_t size) {
  return {.data = address ? memory(name, *address, size) : nullptr,
          .dtype = address ? v05::Dtype{static_cast<std::uint8_t>(dtype)} : v05::Dtype::kNone,
          .size = size,
          .name = name};
}

// The fields of v05.ops.advantage.inputs.Rollouts and Groups, and the output: addresses, with the dtype if there are
// several.
using RolloutFields = std::tuple<std::size_t, bool, Address, int, MaybeAddress, int, MaybeAddress, MaybeAddress,
                                 MaybeAddress, MaybeAddress>;
using GroupFields = std::tuple<std::int64_t, MaybeAddress, MaybeAddress>;
using OutFields = std::tuple<Address, int, std::size_t>;

v05::Rollouts rollouts_of(const RolloutFields& fields, std::size_t out_size) {
  const auto& [rows, by_token, rewards, rewards_dtype, mask, mask_dtype, cu_seqlens, valid, trajectory_ids, energy] =
      fields;
  return {.rewards = buffer("rewards", rewards, rewards_dtype, by_token ? out_size : rows),
          .mask = buffer("response_mask", mask, mask_dtype, out_size),
          .cu_seqlens = view<std::int64_t>("cu_seqlens", cu_seqlens, rows + 1),
          .valid = view<std::uint8_t>("valid", valid, rows),
          .trajectory_ids = view<std::int64_t>("trajectory_ids", trajectory_ids, rows),
          .energy = view<double>("energy", energy, rows),
          .count = rows,
          .by_token = by_token};
}

v05::Groups groups_of(const GroupFields& fields, std::size_t rows) {
  const auto& [count, offsets, ids] = fields;
  return {.offsets = view<std::int64_t>("group_offsets", offsets, static_cast<std::size_t>(count) + 1),
          .ids = view<std::int64_t>("group_ids", ids, rows),
          .count = count};
}

void compute_advantages(const RolloutFields& given, const GroupFields& of_groups, MaybeAddress prior,
                        const v05::Options& options, const OutFields& to, MaybeAddress table, int threads) {
  const auto& [out_address, out_dtype, out_size] = to;
  const v05::Rollouts rollouts = rollouts_of(given, out_size);
  const v05::Groups groups = groups_of(of_groups, rollouts.count);
  const auto count = static_cast<std::size_t>(groups.count);
  const auto priors = view<double>("prior", prior, count);
  const v05::Buffer out = buffer("out", out_address, out_dtype, out_size);
  const v05::Table statistics{.data = reinterpret_cast<double*>(table.value_or(0)), .groups = count};
  const py::gil_scoped_release release;
  v05::compute_advantages(rollouts, groups, priors, options, out, statistics, threads);
}

v05::Options make_options(int baseline, int scale, bool leave_one_out, bool raw_singleton, bool exclude_nonfinite,
                          double low, double high, double eps, std::int64_t max_rollouts, double cost,
                          const std::array<double, 6>& calibration) {
  return {.baseline = static_cast<v05::Baseline>(baseline),
          .scale = static_cast<v05::Scale>(scale),
          .leave_one_out = leave_one_out,
          .raw_singleton = raw_singleton,
          .exclude_nonfinite = exclude_nonfinite,
          .low = low,
          .high = high,
          .eps = eps,
          .max_rollouts = max_rollouts,
          .cost = cost,
          .calibration = {.alpha = calibration[0],
                          .beta = calibration[1],
                          .kappa = calibration[2],
                          .eps = calibration[3],
                          .delta0 = calibration[4],
                          .delta1 = calibration[5]}};
}

}  // namespace

void register_advantage(py::module_& m) {
  using py::arg;
  py::class_<v05::Options>(m, "Options")
      .def(py::init(&make_options), py::kw_only(), arg("baseline"), arg("scale"), arg("leave_one_out"),
           arg("raw_singleton"), arg("exclude_nonfinite"), arg("low"), arg("high"), arg("eps"), arg("max_rollouts"),
           arg("cost"), arg("calibration"));
  m.attr("STATISTICS") = py::cast(v05::kStatistics);
  m.def(
      "check_offsets",
      [](const std::string& name, const py::array_t<std::int64_t, py::array::c_style>& offsets,
         std::optional<std::int64_t> end) {
        v05::check_offsets(name, {offsets.data(), static_cast<std::size_t>(offsets.size())}, end);
      },
      arg("name"), arg("offsets").noconvert(), arg("end"));
  m.def(
      "check_mask",
      [](Address mask, int dtype, std::size_t rows, std::size_t size) {
        v05::check_mask(buffer("response_mask", mask, dtype, size), rows);
      },
      arg("mask"), arg("dtype"), arg("rows"), arg("size"));
  // Arguments are positional, because keywords would cost more than the advantages of a small batch.
  m.def("compute_advantages", &compute_advantages);
}
