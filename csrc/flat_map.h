// A hash map from Key to a small value: open addressing, linear probing, erasure by backward
// shift, so that a lookup touches one or two cache lines and no tombstones build up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "key.h"

namespace tiered_mem {

template <class Value>
class FlatMap {
 public:
  Value* find(Key key) {
    if (size_ == 0) return nullptr;
    for (std::size_t i = home(key);; i = next(i)) {
      if (!cells_[i].used) return nullptr;
      if (cells_[i].key == key) return &cells_[i].value;
    }
  }
  const Value* find(Key key) const { return const_cast<FlatMap*>(this)->find(key); }

  /// Fetches the cell where `find` will start into the CPU's caches.
  void prefetch(Key key) const {
    if (!cells_.empty()) __builtin_prefetch(&cells_[home(key)]);
  }

  /// Inserts or overwrites. Pointers into the map are invalid afterwards.
  Value& put(Key key, Value value) { return (*this)[key] = std::move(value); }

  /// The key's value, new if there was none. Pointers into the map are invalid afterwards.
  Value& operator[](Key key) {
    if ((size_ + 1) * 2 > cells_.size()) grow();
    std::size_t i = home(key);
    while (cells_[i].used && cells_[i].key != key) i = next(i);
    if (!cells_[i].used) {
      cells_[i] = Cell{key, true, Value{}};
      ++size_;
    }
    return cells_[i].value;
  }

  bool erase(Key key) {
    if (size_ == 0) return false;
    std::size_t hole = home(key);
    while (cells_[hole].used && cells_[hole].key != key) hole = next(hole);
    if (!cells_[hole].used) return false;
    for (std::size_t i = next(hole); cells_[i].used; i = next(i)) {
      // A cell may fill the hole only if the hole lies between its home and its place.
      const std::size_t distance_to_home = (i - home(cells_[i].key)) & mask();
      const std::size_t distance_to_hole = (i - hole) & mask();
      if (distance_to_home < distance_to_hole) continue;
      cells_[hole] = std::move(cells_[i]);
      hole = i;
    }
    cells_[hole] = Cell{};
    --size_;
    return true;
  }

  std::size_t size() const { return size_; }

  template <class Visit>
  void each(Visit&& visit) const {
    for (const Cell& cell : cells_)
      if (cell.used) visit(cell.key, cell.value);
  }

 private:
  struct Cell {
    Key key = 0;
    bool used = false;
    Value value{};
  };

  std::size_t mask() const { return cells_.size() - 1; }
  std::size_t next(std::size_t i) const { return (i + 1) & mask(); }
  std::size_t home(Key key) const {
    // Multiply-mix: keys of one layer differ in their low bits only.
    const std::uint64_t mixed = (key ^ key >> 32) * 0x9E3779B97F4A7C15ull;
    return static_cast<std::size_t>(mixed >> 32) & mask();
  }

  void grow() {
    std::vector<Cell> old(cells_.empty() ? 16 : cells_.size() * 2);
    old.swap(cells_);
    size_ = 0;
    for (Cell& cell : old)
      if (cell.used) put(cell.key, std::move(cell.value));
  }

  std::vector<Cell> cells_;
  std::size_t size_ = 0;
};

}  // namespace tiered_mem
