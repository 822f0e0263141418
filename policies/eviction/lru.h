#pragma once

#include "policy.h"
#include "recency_list.h"

namespace tiered_mem {

/// Least recently used.
class Lru final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t) override { list_.push_front(key); }
  bool touch(Key key) override { return list_.move_to_front(key); }
  void erase(Key key) override { list_.erase(key); }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    return list_.pop_back(evictable);
  }
  std::size_t size() const override { return list_.size(); }

 private:
  RecencyList list_;
};

}  // namespace tiered_mem
