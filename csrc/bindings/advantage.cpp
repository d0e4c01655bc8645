#include <pybind11/pybind11.h>
void register_advantage(pybind11::module_&) {}
