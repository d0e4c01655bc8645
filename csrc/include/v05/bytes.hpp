// A little-endian byte format with a header and a checksum, so that damaged or foreign bytes are rejected. No Python.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "v05/group_ids.hpp"

namespace v05 {

// Thrown for bytes that cannot be read. `what()` says why.
struct BytesError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class T>
concept Number = std::integral<T> || std::same_as<T, double>;

class ByteWriter {
 public:
  template <Number T>
  void put(T value) {
    if constexpr (std::same_as<T, double>) {
      put(std::bit_cast<std::uint64_t>(value));
    } else {
      std::array<char, sizeof(T)> bytes{};
      for (std::size_t i = 0; i < sizeof(T); ++i) {
        bytes[i] = static_cast<char>(static_cast<std::uint64_t>(value) >> (8U * i) & 0xffU);
      }
      bytes_.append(bytes.data(), bytes.size());
    }
  }
  void put_size(std::size_t size) { put(static_cast<std::uint64_t>(size)); }
  void put_bytes(std::string_view bytes) { bytes_.append(bytes); }

  [[nodiscard]] const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

class ByteReader {
 public:
  explicit ByteReader(std::string_view bytes) : bytes_(bytes) {}

  template <Number T>
  T get() {
    if constexpr (std::same_as<T, double>) {
      return std::bit_cast<double>(get<std::uint64_t>());
    } else {
      const std::string_view bytes = get_bytes(sizeof(T));
      std::uint64_t value = 0;
      for (std::size_t i = 0; i < sizeof(T); ++i) {
        value |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8U * i);
      }
      return static_cast<T>(value);
    }
  }
  std::string_view get_bytes(std::size_t size) {
    if (size > bytes_.size()) {
      throw BytesError("it ends too early");
    }
    const std::string_view taken = bytes_.substr(0, size);
    bytes_.remove_prefix(size);
    return taken;
  }
  // Reads the number of the items that follow, each of at least `item` bytes. Throws if the rest is too short for them.
  std::size_t get_size(std::size_t item) {
    const auto size = get<std::uint64_t>();
    if (size > bytes_.size() / item) {
      throw BytesError("it ends too early");
    }
    return static_cast<std::size_t>(size);
  }

  [[nodiscard]] std::string_view rest() const { return bytes_; }

 private:
  std::string_view bytes_;
};

// Every step is a bijection of the state, so any change within eight bytes changes the checksum.
inline std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t sum = mix(bytes.size());
  for (; bytes.size() >= sizeof(std::uint64_t); bytes.remove_prefix(sizeof(std::uint64_t))) {
    sum = mix(sum ^ ByteReader(bytes).get<std::uint64_t>());
  }
  for (const char byte : bytes) {
    sum = mix(sum ^ static_cast<unsigned char>(byte));
  }
  return sum;
}

// Returns magic, version, length and checksum, followed by the content.
inline std::string seal(std::string_view magic, std::uint32_t version, std::string_view content) {
  ByteWriter sealed;
  sealed.put_bytes(magic);
  sealed.put(version);
  sealed.put_size(content.size());
  sealed.put(checksum(content));
  sealed.put_bytes(content);
  return sealed.bytes();
}

// Returns the content of bytes that `seal` made. Throws BytesError for other bytes.
inline std::string_view unseal(std::string_view magic, std::uint32_t version, std::string_view sealed) {
  if (!sealed.starts_with(magic)) {
    throw BytesError("it does not start with " + std::string(magic) + ": it is something else, or empty");
  }
  ByteReader reader(sealed.substr(magic.size()));
  const auto found = reader.get<std::uint32_t>();
  if (found != version) {
    throw BytesError("it has format " + std::to_string(found) + " and this v05 reads format " +
                     std::to_string(version) + "; use the v05 that wrote it");
  }
  const auto length = reader.get<std::uint64_t>();
  const auto sum = reader.get<std::uint64_t>();
  if (length != reader.rest().size()) {
    throw BytesError("it holds " + std::to_string(reader.rest().size()) + " of " + std::to_string(length) +
                     " bytes: it was cut off, or something was appended");
  }
  if (sum != checksum(reader.rest())) {
    throw BytesError("its checksum is wrong: it was damaged");
  }
  return reader.rest();
}

}  // namespace v05
