#pragma once

#include <algorithm>

#include "block_lists.h"
#include "frequency_sketch.h"
#include "policy.h"

namespace tiered_mem {

/// W-TinyLFU: newcomers pass through a small LRU window (a hundredth of the bytes, at least one
/// block). The one that must leave it enters the main part only if it was used more often of late
/// than the block that would go there. The main part is a segmented LRU, four fifths protected.
/// Source: Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM
/// Transactions on Storage 2017.
///
/// libCacheSim's W-TinyLFU differs in what it counts: no hits in the window, but one more use for
/// whatever leaves it; its counts are wide, and halved once in 32 hits a block of the main part.
/// Until the cache is full its window takes all, and then fills the protected part as well. It
/// admits nothing below 100 slots, where its window is empty.
class WTinyLfu final : public EvictionPolicy {
 public:
  void set_budget(std::uint64_t nbytes) override { capacity_ = nbytes; }

  void insert(Key key, std::uint64_t nbytes) override {
    lists_.add(kWindow, key, nbytes);
    capacity_ = std::max(capacity_, held());
    sketch_.reserve(size());
    sketch_.add(key);
    while (lists_.nbytes(kWindow) > window_limit() && lists_.size(kWindow) > 1)
      lists_.move(lists_.oldest(kWindow), kProbation);
  }
  bool touch(Key key) override {
    const auto id = lists_.find(key);
    if (id == 0) return false;
    sketch_.add(key);
    lists_.move(id, lists_[id].list == kWindow ? kWindow : kProtected);
    while (lists_.nbytes(kProtected) > (capacity_ - lists_.nbytes(kWindow)) * 4 / 5)
      lists_.move(lists_.oldest(kProtected), kProbation);
    return true;
  }
  void erase(Key key) override {
    if (const auto id = lists_.find(key)) lists_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    capacity_ = held();
    auto victim = lists_.oldest(kProbation, evictable);
    if (victim == 0) victim = lists_.oldest(kProtected, evictable);
    auto candidate = lists_.oldest(kWindow, evictable);
    // The window grows as long as one more fits into its share.
    if (candidate != 0 && victim != 0 &&
        lists_.nbytes(kWindow) + lists_[candidate].nbytes <= window_limit())
      candidate = 0;
    if (candidate == 0) return victim == 0 ? std::nullopt : std::optional(lists_.remove(victim));
    if (victim == 0 ||
        sketch_.estimate(lists_[candidate].key) <= sketch_.estimate(lists_[victim].key))
      return lists_.remove(candidate);
    lists_.move(candidate, kProbation);
    return lists_.remove(victim);
  }
  std::size_t size() const override {
    return lists_.size(kWindow) + lists_.size(kProbation) + lists_.size(kProtected);
  }
  void prefetch(Key key) const { lists_.prefetch(key); }

 private:
  enum : std::uint32_t { kWindow, kProbation, kProtected, kNumLists };
  struct NoNote {};

  std::uint64_t held() const {
    return lists_.nbytes(kWindow) + lists_.nbytes(kProbation) + lists_.nbytes(kProtected);
  }
  std::uint64_t window_limit() const { return std::max<std::uint64_t>(capacity_ / 100, 1); }

  BlockLists<kNumLists, NoNote> lists_;
  FrequencySketch sketch_;
  // What there is room for: the budget until the first eviction tells that guesses or blocks of
  // other sizes take a part of it.
  std::uint64_t capacity_ = 0;
};

}  // namespace tiered_mem
