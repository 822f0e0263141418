// Keys in the order of a score: what policies that rank by more than recency are made of.
#pragma once

#include <optional>
#include <set>
#include <utility>

#include "flat_map.h"
#include "policy.h"

namespace tiered_mem {

/// Keys from the lowest score up, equal ones by key. `Score` has a strict order. O(log n) a call.
template <class Score>
class Ranking {
 public:
  /// Inserts, or moves to another place.
  void put(Key key, Score score) {
    erase(key);
    order_.insert({score, key});
    scores_.put(key, score);
  }
  /// Null if it isn't there. Valid until the next `put` or `erase`.
  const Score* find(Key key) const { return scores_.find(key); }
  bool contains(Key key) const { return find(key) != nullptr; }
  std::size_t size() const { return scores_.size(); }

  /// False if it wasn't there.
  bool erase(Key key) {
    const Score* score = find(key);
    if (score == nullptr) return false;
    order_.erase({*score, key});
    scores_.erase(key);
    return true;
  }

  /// The lowest key that `evictable` admits; it stays.
  std::optional<Key> lowest(const Evictable& evictable = {}) const {
    for (const auto& [score, key] : order_)
      if (evictable(key)) return key;
    return std::nullopt;
  }
  /// The same, and removes it.
  std::optional<Key> pop_lowest(const Evictable& evictable = {}) {
    const auto key = lowest(evictable);
    if (key) erase(*key);
    return key;
  }

 private:
  std::set<std::pair<Score, Key>> order_;
  FlatMap<Score> scores_;
};

}  // namespace tiered_mem
