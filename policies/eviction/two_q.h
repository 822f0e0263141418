#pragma once

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// 2Q, the full version: blocks enter a FIFO queue A1in; one that comes again soon after it left
/// that queue (its key is still in the ghost queue A1out) goes to the LRU list Am. A1in keeps a
/// quarter of the bytes, A1out remembers blocks of half the budget.
/// Source: Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement
/// algorithm", VLDB 1994.
class TwoQ final : public EvictionPolicy {
 public:
  void set_budget(std::uint64_t nbytes) override {
    budget_ = nbytes;
    trim_ghosts();
  }
  void insert(Key key, std::uint64_t nbytes) override {
    if (const auto ghost = lists_.find(key))
      lists_.move(ghost, kMain, nbytes);
    else
      lists_.add(kIn, key, nbytes);
    trim_ghosts();
  }
  bool touch(Key key) override {
    const auto id = lists_.find(key);
    if (id == 0 || lists_[id].list == kOut) return false;
    if (lists_[id].list == kMain) lists_.move(id, kMain);
    return true;
  }
  void erase(Key key) override {
    const auto id = lists_.find(key);
    if (id != 0 && lists_[id].list != kOut) lists_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key incoming) override {
    const std::uint64_t held = lists_.nbytes(kIn) + lists_.nbytes(kMain);
    const bool in_first = lists_.nbytes(kIn) > held / 4;
    auto id = lists_.oldest(in_first ? kIn : kMain, evictable);
    if (id == 0) id = lists_.oldest(in_first ? kMain : kIn, evictable);
    if (id == 0) return std::nullopt;
    if (lists_[id].list == kMain) return lists_.remove(id);
    lists_.move(id, kOut);
    const Key key = lists_[id].key;
    if (incoming == kNoKey) trim_ghosts();  // or after its insert: it may be the oldest ghost
    return key;
  }
  std::size_t size() const override { return lists_.size(kIn) + lists_.size(kMain); }
  void prefetch(Key key) const { lists_.prefetch(key); }

 private:
  enum : std::uint32_t { kIn, kMain, kOut, kNumLists };
  struct NoNote {};

  void trim_ghosts() {
    while (lists_.nbytes(kOut) > budget_ / 2) lists_.remove(lists_.oldest(kOut));
  }

  BlockLists<kNumLists, NoNote> lists_;
  std::uint64_t budget_ = 0;
};

}  // namespace tiered_mem
