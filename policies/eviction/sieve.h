#pragma once

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// SIEVE: a hand moves from the oldest block to the newest and around, takes the first that wasn't
/// used since it last came by, and moves nothing. Pinned blocks are passed over untouched.
/// Source: Zhang et al., "SIEVE is simpler than LRU", NSDI 2024.
class Sieve final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t nbytes) override { blocks_.add(kQueue, key, nbytes); }
  bool touch(Key key) override {
    const auto id = blocks_.find(key);
    if (id == 0) return false;
    blocks_[id].note.used = true;
    return true;
  }
  void erase(Key key) override {
    if (const auto id = blocks_.find(key)) remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    // The first round clears what was used, so the second ends at any block that may go.
    for (std::size_t step = 0; step < 2 * size(); ++step) {
      if (hand_ == kQueue) hand_ = blocks_.oldest(kQueue);
      auto& block = blocks_[hand_];
      if (evictable(block.key) && !std::exchange(block.note.used, false)) return remove(hand_);
      hand_ = block.newer;
    }
    return std::nullopt;
  }
  std::size_t size() const override { return blocks_.size(kQueue); }
  void prefetch(Key key) const { blocks_.prefetch(key); }

 private:
  enum List : std::uint32_t { kQueue, kNumLists };
  struct Note {
    bool used = false;
  };
  using Blocks = BlockLists<kNumLists, Note>;

  Key remove(Blocks::Id id) {
    if (id == hand_) hand_ = blocks_[id].newer;
    return blocks_.remove(id);
  }

  Blocks blocks_;
  Blocks::Id hand_ = kQueue;  // the block to look at next; the list's end: the oldest
};

}  // namespace tiered_mem
