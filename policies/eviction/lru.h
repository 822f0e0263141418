#pragma once

#include "eviction/recency_list.h"

namespace tiered_mem {

/// Least recently used. A guessed block enters as the oldest, so that a wrong guess leaves first.
class Lru final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t, Entry entry) override {
    entry == Entry::guessed ? list_.push_back(key) : list_.push_front(key);
  }
  void touch(Key key) override { list_.move_to_front(key); }
  void erase(Key key) override { list_.erase(key); }
  std::optional<Key> evict(const Evictable& evictable) override {
    return list_.pop_back(evictable);
  }
  std::size_t size() const override { return list_.size(); }

 private:
  RecencyList list_;
};

}  // namespace tiered_mem
