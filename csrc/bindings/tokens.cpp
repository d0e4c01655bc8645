#include "v05/tokens.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace py = pybind11;

namespace {

// v05.ops passes addresses of tensors that it has checked: float32 rows and int64 ids.
using Address = std::uintptr_t;
using Rows = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;  // data, length and the two strides
using Targets = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, double>;

template <class Value>
v05::LogitRows<Value> rows_of(const Rows& given) {
  const auto& [data, length, stride_sequence, stride_token] = given;
  return {.data = reinterpret_cast<Value*>(data),
          .length = length,
          .stride_sequence = stride_sequence,
          .stride_token = stride_token};
}

v05::TokenTargets targets_of(const Targets& given) {
  const auto& [ids, tokens, columns, first, temperature] = given;
  return {.ids = reinterpret_cast<const std::int64_t*>(ids),
          .tokens = tokens,
          .columns = columns,
          .first = first,
          .temperature = temperature};
}

void add_up_logits(const Rows& logits, const Targets& targets, Address out, std::int64_t stride, int threads) {
  const auto rows = rows_of<const float>(logits);
  const v05::TokenTargets asked = targets_of(targets);
  const py::gil_scoped_release release;
  v05::add_up_logits(rows, asked, reinterpret_cast<float*>(out), stride, threads);
}

void write_logit_gradient(const Rows& logits, const Targets& targets, Address state, std::int64_t stride,
                          Address of_logprob, std::optional<Address> of_entropy, const Rows& out, int threads) {
  const auto rows = rows_of<const float>(logits);
  const v05::TokenTargets asked = targets_of(targets);
  const v05::TokenUpstream upstream = {.state = reinterpret_cast<const float*>(state),
                                       .stride = stride,
                                       .of_logprob = reinterpret_cast<const float*>(of_logprob),
                                       .of_entropy = reinterpret_cast<const float*>(of_entropy.value_or(0))};
  const auto to = rows_of<float>(out);
  const py::gil_scoped_release release;
  v05::write_logit_gradient(rows, asked, upstream, to, threads);
}

}  // namespace

void register_tokens(py::module_& m);
void register_tokens(py::module_& m) {
  m.def("add_up_logits", &add_up_logits);
  m.def("write_logit_gradient", &write_logit_gradient);
}
