#include "v05/grouping.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "v05/pages.hpp"

namespace py = pybind11;

namespace {

using Ids = py::array_t<std::int64_t, py::array::c_style>;

std::pair<Ids, std::int64_t> number_ids(const Ids& ids) {
  Ids numbers(ids.size());
  const std::span<const std::int64_t> id_view(ids.data(), static_cast<std::size_t>(ids.size()));
  const std::span<std::int64_t> number_view(numbers.mutable_data(), id_view.size());
  std::int64_t found = 0;
  {
    const py::gil_scoped_release release;
    v05::prefer_huge_pages(number_view);
    found = v05::number_ids(id_view, number_view);
  }
  return {std::move(numbers), found};
}

// Returns one array: first the offsets of the groups (num_groups + 1), and from `start` on the rows ordered by group.
Ids order_rows(const Ids& ids, std::int64_t num_groups, std::int64_t start) {
  const std::span<const std::int64_t> id_view(ids.data(), static_cast<std::size_t>(ids.size()));
  v05::check_ids(id_view, num_groups);
  if (num_groups < 0 || start <= num_groups) {
    throw std::invalid_argument("start=" + std::to_string(start) + " leaves no room for " + std::to_string(num_groups) +
                                " groups and their end");
  }
  Ids parts(start + ids.size());
  const std::span<std::int64_t> all(parts.mutable_data(), static_cast<std::size_t>(parts.size()));
  const auto begin = static_cast<std::size_t>(start);
  std::fill_n(all.begin(), begin, std::int64_t{0});
  const py::gil_scoped_release release;
  v05::order_rows(id_view, all.first(static_cast<std::size_t>(num_groups) + 1), all.subspan(begin));
  return parts;
}

using Keys = std::span<PyObject* const>;

// The items of a sequence or an object array, and the object that keeps them alive.
std::pair<Keys, py::object> items_of(const py::object& keys) {
  if (py::isinstance<py::array>(keys) && py::cast<py::array>(keys).dtype().kind() == 'O') {
    auto array = py::array::ensure(keys, py::array::c_style);
    const Keys items(static_cast<PyObject* const*>(array.data()), static_cast<std::size_t>(array.size()));
    return {items, std::move(array)};
  }
  auto fast =
      py::reinterpret_steal<py::object>(PySequence_Fast(keys.ptr(), "keys: give a sequence or an object array"));
  if (!fast) {
    throw py::error_already_set();
  }
  const Keys items(PySequence_Fast_ITEMS(fast.ptr()), static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr())));
  return {items, std::move(fast)};
}

template <class Is>
std::size_t count_if_ahead(Keys keys, const Is& is) {
  constexpr std::size_t kAhead = 16;
  std::size_t count = 0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    __builtin_prefetch(keys[std::min(i + kAhead, keys.size() - 1)]);
    count += static_cast<std::size_t>(keys[i] != nullptr && is(keys[i]));
  }
  return count;
}

// Whether the keys are strings. Throws std::invalid_argument if only some are.
bool are_strings(const std::string& name, const py::object& keys) {
  const auto [items, owner] = items_of(keys);
  const std::size_t strings = count_if_ahead(items, [](PyObject* key) { return PyUnicode_Check(key) != 0; });
  if (strings != 0 && strings != items.size()) {
    throw std::invalid_argument(name + ": mix strings and other types; give one kind");
  }
  return strings != 0;
}

// Whether all keys are exactly of type str. Hashing and comparing those runs no Python code, so the borrowed keys stay
// alive.
bool all_exact_strings(Keys keys) {
  return count_if_ahead(keys, [](PyObject* key) { return PyUnicode_CheckExact(key) != 0; }) == keys.size();
}

bool equal_strings(PyObject* a, PyObject* b) {
  return a == b || (PyUnicode_GET_LENGTH(a) == PyUnicode_GET_LENGTH(b) && PyUnicode_KIND(a) == PyUnicode_KIND(b) &&
                    std::memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b),
                                static_cast<std::size_t>(PyUnicode_GET_LENGTH(a) * PyUnicode_KIND(a))) == 0);
}

std::int64_t number_strings(Keys keys, std::span<std::int64_t> ids) {
  constexpr std::size_t kAhead = 48;  // prefetch beyond the batch of number_by_appearance
  const auto hash_of = [&](std::size_t row) {
    __builtin_prefetch(keys[std::min(row + kAhead, keys.size() - 1)]);
    return static_cast<std::uint64_t>(PyObject_Hash(keys[row]));  // the string caches its hash
  };
  return v05::number_by_appearance(ids, hash_of,
                                   [&](std::size_t a, std::size_t b) { return equal_strings(keys[a], keys[b]); });
}

// Numbers any hashable keys by a dict. A tuple keeps the keys alive, because their __hash__ and __eq__ may run Python
// code.
std::int64_t number_hashables(const py::tuple& keys, std::span<std::int64_t> ids) {
  py::dict slots;
  std::int64_t next = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const py::object key = keys[i];
    PyObject* slot = PyDict_GetItemWithError(slots.ptr(), key.ptr());
    if (slot == nullptr) {
      if (PyErr_Occurred() != nullptr) {
        throw py::error_already_set();
      }
      slots[key] = next;
      ids[i] = next++;
    } else {
      ids[i] = PyLong_AsLongLong(slot);
    }
  }
  return next;
}

// Numbers strings or other hashable keys by first appearance. `keys` is a sequence or an object array.
std::pair<Ids, std::int64_t> factorize(const py::object& keys) {
  const auto [items, owner] = items_of(keys);
  Ids ids(static_cast<py::ssize_t>(items.size()));
  const std::span<std::int64_t> id_view(ids.mutable_data(), items.size());
  const std::int64_t found =
      all_exact_strings(items) ? number_strings(items, id_view) : number_hashables(py::tuple(keys), id_view);
  return {std::move(ids), found};
}

}  // namespace

void register_grouping(py::module_& m) {
  m.def("order_rows", &order_rows, py::arg("ids").noconvert(), py::arg("num_groups"), py::arg("start"));
  m.def("number_ids", &number_ids, py::arg("ids").noconvert());
  m.def("are_strings", &are_strings, py::arg("name"), py::arg("keys"));
  m.def("factorize", &factorize, py::arg("keys"));
}
