#pragma once

#include <utility>
#include <vector>

#include "flat_map.h"
#include "policy.h"
#include "ranking.h"

namespace tiered_mem {

/// Least-Stale (SpecMD, Hoang et al., 2026, arXiv:2602.03921): layers come in turn, so a block that
/// the current forward pass hasn't used is stale, and goes before any that it has. Among the stale
/// ones layers go in the order of the pass: those already passed, whose next turn is farthest off,
/// before those that are still to come, which is where LRU takes its victims. Within a layer the
/// block unused for longest goes.
///
/// A pass begins with an event on a lower layer than the one before, or on the same again.
class LeastStale final : public EvictionPolicy {
 public:
  void begin_event(Partition partition) override {
    const auto layer = static_cast<std::uint16_t>(partition);
    // Kinds may alternate within a layer (its KV, then its experts).
    if (begun_ && (layer < layer_of(last_) || partition == last_)) begin_pass();
    begun_ = true;
    last_ = partition;
  }
  void insert(Key key, std::uint64_t) override { use(key); }
  bool touch(Key key) override {
    if (!fresh_.contains(key) && !stale_.erase(key)) return false;
    use(key);
    return true;
  }
  void erase(Key key) override {
    if (!fresh_.erase(key)) stale_.erase(key);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    if (auto key = stale_.pop_lowest(evictable)) return key;
    return fresh_.pop_lowest(evictable);
  }
  std::size_t size() const override { return stale_.size() + fresh_.size(); }

 private:
  using Score = std::pair<std::uint16_t, std::uint64_t>;  // layer, then the time of the last use

  static std::uint16_t layer_of(Partition partition) {
    return static_cast<std::uint16_t>(partition);
  }
  void use(Key key) { fresh_.put(key, {layer_of(partition_of(key)), ++num_requests_}); }
  void begin_pass() {
    while (const auto key = fresh_.lowest()) {
      stale_.put(*key, *fresh_.find(*key));
      fresh_.erase(*key);
    }
  }

  bool begun_ = false;
  Partition last_ = 0;
  std::uint64_t num_requests_ = 0;
  Ranking<Score> stale_, fresh_;
};

}  // namespace tiered_mem
