// Memory that is taken before anything changes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace v05 {

// Room for `more` elements, which can then be added without memory.
template <class T>
void make_room(std::vector<T>& elements, std::size_t more) {
  if (elements.capacity() - elements.size() < more) {
    elements.reserve(std::max(elements.size() + more, 2 * elements.capacity()));
  }
}

}  // namespace v05
