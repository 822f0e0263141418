#pragma once

#include <utility>
#include <vector>

#include "flat_map.h"
#include "policy.h"

namespace tiered_mem {

/// Any block, each with the same chance. The seed is fixed, so a run can be repeated: what others
/// are measured against.
class Random final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t) override {
    places_.put(key, static_cast<std::uint32_t>(keys_.size()));
    keys_.push_back(key);
  }
  bool touch(Key key) override { return places_.find(key) != nullptr; }
  void erase(Key key) override {
    if (const std::uint32_t* place = places_.find(key)) {
      swap(*place, keys_.size() - 1);
      keys_.pop_back();
      places_.erase(key);
    }
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    // Draws without repetition: what was drawn in vain goes behind the part that is left.
    for (std::size_t left = keys_.size(); left > 0; --left) {
      const std::size_t place = next_random() % left;
      const Key key = keys_[place];
      if (evictable(key)) {
        erase(key);
        return key;
      }
      swap(place, left - 1);
    }
    return std::nullopt;
  }
  std::size_t size() const override { return keys_.size(); }

 private:
  void swap(std::size_t a, std::size_t b) {
    std::swap(keys_[a], keys_[b]);
    places_.put(keys_[a], static_cast<std::uint32_t>(a));
    places_.put(keys_[b], static_cast<std::uint32_t>(b));
  }
  /// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
  std::uint64_t next_random() {
    std::uint64_t mixed = state_ += 0x9E3779B97F4A7C15ull;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9ull;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBull;
    return mixed ^ mixed >> 31;
  }

  std::uint64_t state_ = 0;
  std::vector<Key> keys_;
  FlatMap<std::uint32_t> places_;
};

}  // namespace tiered_mem
