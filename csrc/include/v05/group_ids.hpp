// Group ids in the order in which groups were opened. No two open groups have the same id. No Python.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

namespace v05 {

// splitmix64 (Steele, Lea & Flood 2014): a bijection of 64 bits.
inline std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}

// Seeds derive from these keys. std::hash is not used because it can differ between platforms.
inline std::uint64_t key_of(std::int64_t id) { return static_cast<std::uint64_t>(id); }

// FNV-1a over the UTF-8 bytes.
inline std::uint64_t key_of(const std::string& id) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const char character : id) {
    hash = (hash ^ static_cast<unsigned char>(character)) * 0x100000001b3U;
  }
  return hash;
}

// A queue of ids by slot, with a hash table of positions (linear probing) to find ids that are taken. A
// std::unordered_set would be half of the memory of an open group, and would hold every string twice.
template <class Id>
class GroupIds {
 public:
  // Returns false and adds nothing if the id is taken. Adds nothing if it throws.
  bool push_back(Id id) {
    if (2 * (taken_ + 1) > table_.size()) {
      grow();
    }
    const std::size_t place = find(id);
    if (table_[place] != kFree) {
      return false;
    }
    ids_.push_back(std::move(id));
    table_[place] = popped_ + static_cast<std::int64_t>(ids_.size()) - 1;
    ++taken_;
    return true;
  }

  // Adds a slot whose id is already released.
  void push_released() { ids_.emplace_back(); }

  [[nodiscard]] const Id& operator[](std::size_t slot) const { return ids_[slot]; }
  [[nodiscard]] std::size_t size() const { return ids_.size(); }

  // Makes the id available again; its slot stays.
  void release(std::size_t slot) {
    std::size_t hole = find(ids_[slot]);
    // Entries that the hole would cut off from their home move into it, so that no tombstones accumulate.
    for (std::size_t at = next(hole); table_[at] != kFree; at = next(at)) {
      const std::size_t from_home = (at - home(id_of(table_[at]))) & mask();
      if (from_home >= ((at - hole) & mask())) {
        table_[hole] = table_[at];
        hole = at;
      }
    }
    table_[hole] = kFree;
    --taken_;
    ids_[slot] = {};
  }

  // Only for slots whose ids are released.
  void pop_front() {
    ids_.pop_front();
    ++popped_;
  }

  // Removes all ids after the first `size`.
  void shrink(std::size_t size) {
    while (ids_.size() > size) {
      release(ids_.size() - 1);
      ids_.pop_back();
    }
  }

 private:
  static constexpr std::int64_t kFree = -1;

  [[nodiscard]] std::size_t mask() const { return table_.size() - 1; }
  [[nodiscard]] std::size_t next(std::size_t at) const { return (at + 1) & mask(); }
  [[nodiscard]] std::size_t home(const Id& id) const { return mix(key_of(id)) & mask(); }
  [[nodiscard]] const Id& id_of(std::int64_t entry) const { return ids_[static_cast<std::size_t>(entry - popped_)]; }

  // The place of the id in the table, or the free place for it.
  [[nodiscard]] std::size_t find(const Id& id) const {
    std::size_t at = home(id);
    while (table_[at] != kFree && id_of(table_[at]) != id) {
      at = next(at);
    }
    return at;
  }

  void grow() {
    const auto old = std::exchange(table_, std::vector<std::int64_t>(2 * table_.size(), kFree));
    for (const std::int64_t entry : old) {
      if (entry != kFree) {
        table_[find(id_of(entry))] = entry;
      }
    }
  }

  std::deque<Id> ids_;
  std::int64_t popped_ = 0;
  std::vector<std::int64_t> table_ = std::vector<std::int64_t>(16, kFree);  // a power of two, at most half full
  std::size_t taken_ = 0;
};

}  // namespace v05
