#pragma once

#include <algorithm>

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// Segmented LRU with four segments of equal bytes. A block enters the lowest; every use lifts it
/// by one, and what a segment holds too much of sinks into the one below. Victims come from the
/// lowest. Where a segment is smaller than a block (fewer than four slots) this is LRU.
/// Sources: Karedla, Love and Wherry, "Caching strategies to improve disk system performance",
/// IEEE Computer 1994; four segments as in Huang et al., "An analysis of Facebook photo caching",
/// SOSP 2013. libCacheSim's SLRU gives the same misses where four divides the budget; elsewhere it
/// leaves the remainder of the division empty.
class Slru final : public EvictionPolicy {
 public:
  void set_budget(std::uint64_t nbytes) override { capacity_ = nbytes; }

  void insert(Key key, std::uint64_t nbytes) override {
    // Until all is full, the lowest that has room.
    std::uint32_t segment = 0;
    while (segment < kNumSegments && lists_.nbytes(segment) + nbytes > limit()) ++segment;
    lists_.add(segment == kNumSegments ? 0 : segment, key, nbytes);
    capacity_ = std::max(capacity_, held());
  }
  bool touch(Key key) override {
    const auto id = lists_.find(key);
    if (id == 0) return false;
    std::uint32_t segment = std::min(lists_[id].list + 1, kNumSegments - 1);
    lists_.move(id, segment);
    for (; segment > 0; --segment)
      while (lists_.nbytes(segment) > limit()) lists_.move(lists_.oldest(segment), segment - 1);
    return true;
  }
  void erase(Key key) override {
    if (const auto id = lists_.find(key)) lists_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    capacity_ = held();
    for (std::uint32_t segment = 0; segment < kNumSegments; ++segment)
      if (const auto id = lists_.oldest(segment, evictable)) return lists_.remove(id);
    return std::nullopt;
  }
  std::size_t size() const override {
    std::size_t total = 0;
    for (std::uint32_t segment = 0; segment < kNumSegments; ++segment)
      total += lists_.size(segment);
    return total;
  }
  void prefetch(Key key) const { lists_.prefetch(key); }

 private:
  static constexpr std::uint32_t kNumSegments = 4;
  struct NoNote {};

  std::uint64_t held() const {
    std::uint64_t nbytes = 0;
    for (std::uint32_t segment = 0; segment < kNumSegments; ++segment)
      nbytes += lists_.nbytes(segment);
    return nbytes;
  }
  std::uint64_t limit() const { return capacity_ / kNumSegments; }

  BlockLists<kNumSegments, NoNote> lists_;
  // What there is room for: the budget until the first eviction tells that guesses or blocks of
  // other sizes take a part of it.
  std::uint64_t capacity_ = 0;
};

}  // namespace tiered_mem
