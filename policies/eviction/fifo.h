#pragma once

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// First in, first out.
class Fifo final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t nbytes) override { blocks_.add(kQueue, key, nbytes); }
  bool touch(Key key) override { return blocks_.find(key) != 0; }
  void erase(Key key) override {
    if (const auto id = blocks_.find(key)) blocks_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    const auto id = blocks_.oldest(kQueue, evictable);
    if (id == 0) return std::nullopt;
    return blocks_.remove(id);
  }
  std::size_t size() const override { return blocks_.size(kQueue); }
  void prefetch(Key key) const { blocks_.prefetch(key); }

 private:
  enum List : std::uint32_t { kQueue, kNumLists };
  struct NoNote {};
  BlockLists<kNumLists, NoNote> blocks_;
};

}  // namespace tiered_mem
