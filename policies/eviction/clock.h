#pragma once

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// CLOCK, also known as second chance: FIFO, but a block that was used since it was last looked
/// at is put back as the newest, once. Pinned blocks are passed over and keep their place.
/// Source: Corbató, "A paging experiment with the Multics system", 1968.
class Clock final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t nbytes) override { blocks_.add(kQueue, key, nbytes); }
  bool touch(Key key) override {
    const auto id = blocks_.find(key);
    if (id == 0) return false;
    blocks_[id].note.used = true;
    return true;
  }
  void erase(Key key) override {
    if (const auto id = blocks_.find(key)) blocks_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    for (auto id = blocks_.oldest(kQueue); id != kQueue;) {
      auto& block = blocks_[id];
      const auto next = block.newer;
      if (evictable(block.key)) {
        if (!block.note.used) return blocks_.remove(id);
        block.note.used = false;
        blocks_.move(id, kQueue);
      }
      id = next;
    }
    // All that may go had been used: each has had its second chance now.
    const auto id = blocks_.oldest(kQueue, evictable);
    if (id == 0) return std::nullopt;
    return blocks_.remove(id);
  }
  std::size_t size() const override { return blocks_.size(kQueue); }
  void prefetch(Key key) const { blocks_.prefetch(key); }

 private:
  enum List : std::uint32_t { kQueue, kNumLists };
  struct Note {
    bool used = false;
  };
  BlockLists<kNumLists, Note> blocks_;
};

}  // namespace tiered_mem
