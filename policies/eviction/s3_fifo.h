#pragma once

#include <algorithm>

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// S3-FIFO: a small FIFO queue for newcomers, a main one and a queue of ghosts. A block that was
/// used twice in the small queue, or comes again while its ghost is remembered, is kept in the main
/// queue, which gives a block another round for every use, up to three. The small queue has a tenth
/// of the bytes, the ghosts nine tenths.
/// Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. As in its
/// authors' libCacheSim, the main queue takes what overflows the small one until the cache is full.
/// libCacheSim admits nothing below 20 slots, where the small queue holds less than two.
class S3Fifo final : public EvictionPolicy {
 public:
  void set_budget(std::uint64_t nbytes) override {
    full_ &= nbytes <= budget_;
    budget_ = nbytes;
    trim_ghosts();
  }
  void insert(Key key, std::uint64_t nbytes) override {
    if (const auto ghost = lists_.find(key)) {
      lists_.move(ghost, kMain, nbytes);
      lists_[ghost].note.num_uses = 0;
    } else {
      const bool overflows = !full_ && lists_.nbytes(kSmall) + nbytes > budget_ / 10;
      lists_.add(overflows ? kMain : kSmall, key, nbytes);
    }
    trim_ghosts();
  }
  bool touch(Key key) override {
    const auto id = lists_.find(key);
    if (id == 0 || lists_[id].list == kGhost) return false;
    std::uint8_t& num_uses = lists_[id].note.num_uses;
    num_uses = std::min(num_uses + 1, 3);
    return true;
  }
  void erase(Key key) override {
    const auto id = lists_.find(key);
    if (id != 0 && lists_[id].list != kGhost) lists_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key incoming) override {
    full_ = true;
    const std::uint64_t held = lists_.nbytes(kSmall) + lists_.nbytes(kMain);
    // Whether one more would fit into the small queue's share.
    const auto oldest = lists_.oldest(kMain);
    const bool main_first =
        oldest != kMain && lists_.nbytes(kSmall) + lists_[oldest].nbytes <= held / 10;
    auto key = main_first ? evict_main(evictable) : evict_small(evictable);
    if (!key) key = main_first ? evict_small(evictable) : evict_main(evictable);
    if (incoming == kNoKey) trim_ghosts();  // or after its insert: it may be the oldest ghost
    return key;
  }
  std::size_t size() const override { return lists_.size(kSmall) + lists_.size(kMain); }
  void prefetch(Key key) const { lists_.prefetch(key); }

 private:
  enum : std::uint32_t { kSmall, kMain, kGhost, kNumLists };
  struct Note {
    std::uint8_t num_uses = 0;
  };

  std::optional<Key> evict_small(const Evictable& evictable) {
    for (auto id = lists_.oldest(kSmall), newer = id; id != kSmall; id = newer) {
      newer = lists_[id].newer;
      if (!evictable(lists_[id].key)) continue;
      if (lists_[id].note.num_uses >= 2) {
        lists_[id].note.num_uses = 0;
        lists_.move(id, kMain);
        continue;
      }
      lists_.move(id, kGhost);
      return lists_[id].key;
    }
    return std::nullopt;
  }
  // A block that is moved to the front comes up again, with a use less: the walk ends.
  std::optional<Key> evict_main(const Evictable& evictable) {
    for (auto id = lists_.oldest(kMain); id != kMain;) {
      const auto here = id;
      id = lists_[here].newer;
      if (!evictable(lists_[here].key)) continue;
      if (lists_[here].note.num_uses == 0) return lists_.remove(here);
      --lists_[here].note.num_uses;
      lists_.move(here, kMain);
      if (id == kMain) id = here;  // it was the newest already
    }
    return std::nullopt;
  }
  void trim_ghosts() {
    while (lists_.nbytes(kGhost) > budget_ * 9 / 10) lists_.remove(lists_.oldest(kGhost));
  }

  BlockLists<kNumLists, Note> lists_;
  std::uint64_t budget_ = 0;
  bool full_ =
      false;  // whether there was an eviction: only then do newcomers wait in the small queue
};

}  // namespace tiered_mem
