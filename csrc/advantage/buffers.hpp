// Calls a function with the typed elements of a caller's buffer.
#pragma once

#include <cstdint>
#include <span>

#include "v05/advantage.hpp"

namespace v05 {

// Calls body with the values of rewards or advantages, which are float or double.
template <class Body>
void with_real(const Buffer& buffer, const Body& body) {
  buffer.dtype == Dtype::kFloat32 ? body(buffer.as<float>()) : body(buffer.as<double>());
}

// Calls body with the values of a mask of any supported type.
template <class Body>
void with_mask(const Buffer& mask, const Body& body) {
  switch (mask.dtype) {
    case Dtype::kInt64:
      body(mask.as<const std::int64_t>());
      break;
    case Dtype::kInt32:
      body(mask.as<const std::int32_t>());
      break;
    case Dtype::kFloat32:
      body(mask.as<const float>());
      break;
    case Dtype::kFloat64:
      body(mask.as<const double>());
      break;
    default:
      body(mask.as<const std::uint8_t>());
  }
}

template <class Mask>
bool is_flag(Mask value) {
  return value == Mask{0} || value == Mask{1};
}

}  // namespace v05
