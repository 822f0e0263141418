#pragma once

#include "policy.h"
#include "recency_list.h"

namespace tiered_mem {

/// First in, first out.
class Fifo final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t) override { queue_.push_front(key); }
  bool touch(Key key) override { return queue_.contains(key); }
  void erase(Key key) override { queue_.erase(key); }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    return queue_.pop_back(evictable);
  }
  std::size_t size() const override { return queue_.size(); }

 private:
  RecencyList queue_;
};

}  // namespace tiered_mem
