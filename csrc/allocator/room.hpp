// Allocates memory before anything changes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace v05 {

// Reserves room for `more` elements, so that adding them allocates no memory.
template <class T>
void make_room(std::vector<T>& elements, std::size_t more) {
  if (elements.capacity() - elements.size() < more) {
    elements.reserve(std::max(elements.size() + more, 2 * elements.capacity()));
  }
}

}  // namespace v05
