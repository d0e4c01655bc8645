#include <pybind11/pybind11.h>

#include "v05/multiversion.hpp"

namespace py = pybind11;

namespace {

// The loader picks one of these by the same rule as the clones of the kernels.
#ifdef V05_MULTIVERSIONED
__attribute__((target("arch=x86-64-v4"))) const char* instruction_set() { return "x86-64-v4 (AVX-512)"; }
__attribute__((target("arch=x86-64-v3"))) const char* instruction_set() { return "x86-64-v3 (AVX2)"; }
__attribute__((target("default"))) const char* instruction_set() { return "x86-64 (SSE2)"; }
#else
const char* instruction_set() { return "the one it was built for"; }
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = V05_COMPILER;
  info["flags"] = V05_FLAGS;
  info["openmp"] = kOpenMP;
  info["instruction_set"] = instruction_set();
  return info;
}

}  // namespace

void register_build(py::module_& m) { m.def("build_info", &build_info); }
