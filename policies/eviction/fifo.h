#pragma once

#include "eviction/recency_list.h"

namespace tiered_mem {

/// First in, first out. A guessed block joins the queue when it is first used; until then it is
/// the first to leave.
class Fifo final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t, Entry entry) override {
    (entry == Entry::guessed ? guessed_ : queue_).push_front(key);
  }
  void touch(Key key) override {
    if (!guessed_.contains(key)) return;
    guessed_.erase(key);
    queue_.push_front(key);
  }
  void erase(Key key) override {
    guessed_.erase(key);
    queue_.erase(key);
  }
  std::optional<Key> evict(const Evictable& evictable) override {
    if (auto key = guessed_.pop_back(evictable)) return key;
    return queue_.pop_back(evictable);
  }
  std::size_t size() const override { return guessed_.size() + queue_.size(); }

 private:
  RecencyList guessed_, queue_;
};

}  // namespace tiered_mem
