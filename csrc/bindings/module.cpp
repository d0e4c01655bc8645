#include <pybind11/pybind11.h>

void register_advantage(pybind11::module_& m);
void register_grouping(pybind11::module_& m);
void register_allocator(pybind11::module_& m);
void register_tokens(pybind11::module_& m);
void register_build(pybind11::module_& m);

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "v05's C++ core: fused advantages and token statistics on the CPU, and the rollout allocator. Private; use "
      "v05.ops and v05.budget.";
  register_advantage(m);
  register_grouping(m);
  register_allocator(m);
  register_tokens(m);
  register_build(m);
}
