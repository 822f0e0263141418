#pragma once

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// Least recently used.
class Lru final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t nbytes) override { blocks_.add(kUsed, key, nbytes); }
  bool touch(Key key) override {
    const auto id = blocks_.find(key);
    if (id == 0) return false;
    blocks_.move(id, kUsed);
    return true;
  }
  void erase(Key key) override {
    if (const auto id = blocks_.find(key)) blocks_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    const auto id = blocks_.oldest(kUsed, evictable);
    if (id == 0) return std::nullopt;
    return blocks_.remove(id);
  }
  std::size_t size() const override { return blocks_.size(kUsed); }
  void prefetch(Key key) const { blocks_.prefetch(key); }

 private:
  enum List : std::uint32_t { kUsed, kNumLists };
  struct NoNote {};
  BlockLists<kNumLists, NoNote> blocks_;
};

}  // namespace tiered_mem
