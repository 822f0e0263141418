#pragma once

#include <utility>
#include <vector>

#include "flat_map.h"
#include "policy.h"
#include "ranking.h"
#include "recency_list.h"

namespace tiered_mem {

/// Least frequent recently used (Bilal and Kang, IEEE Access 2017, arXiv:1702.04078): half of the
/// budget is privileged and kept by recency, the other half by an approximated LFU. A block is
/// promoted when it has been used at least as often as the one that it displaces, which goes back
/// to the others; victims come from these.
///
/// The paper counts uses in a window of time; here the counts are halved once in as many uses as
/// ten times the number of blocks.
class Lfru final : public EvictionPolicy {
 public:
  void set_budget(std::uint64_t nbytes) override {
    budget_ = nbytes;
    while (privileged_nbytes_ > budget_ / 2) demote(*privileged_.pop_back({}));
  }
  void insert(Key key, std::uint64_t nbytes) override {
    blocks_.put(key, {nbytes, 1});
    rank(key);
    age();
  }
  bool touch(Key key) override {
    Block* block = blocks_.find(key);
    if (block == nullptr) return false;
    ++block->num_uses;
    if (!privileged_.move_to_front(key)) promote(key);
    age();
    return true;
  }
  void erase(Key key) override {
    if (privileged_.erase(key)) privileged_nbytes_ -= blocks_.find(key)->nbytes;
    others_.erase(key);
    blocks_.erase(key);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    auto key = others_.pop_lowest(evictable);
    if (!key && (key = privileged_.pop_back(evictable)))
      privileged_nbytes_ -= blocks_.find(*key)->nbytes;
    if (key) blocks_.erase(*key);
    return key;
  }
  std::size_t size() const override { return blocks_.size(); }

 private:
  struct Block {
    std::uint64_t nbytes = 0, num_uses = 0;
  };
  using Score = std::pair<std::uint64_t, std::uint64_t>;  // uses, then the time of the last one

  void rank(Key key) { others_.put(key, {blocks_.find(key)->num_uses, ++num_requests_}); }
  void demote(Key key) {
    privileged_nbytes_ -= blocks_.find(key)->nbytes;
    rank(key);
  }
  /// Ranks it among the others if it can't be privileged.
  void promote(Key key) {
    const Block block = *blocks_.find(key);
    rank(key);
    if (block.nbytes > budget_ / 2) return;
    while (privileged_nbytes_ + block.nbytes > budget_ / 2) {
      const Key oldest = *privileged_.pop_back({});
      if (blocks_.find(oldest)->num_uses > block.num_uses) {
        privileged_.push_back(oldest);
        return;
      }
      demote(oldest);
    }
    others_.erase(key);
    privileged_.push_front(key);
    privileged_nbytes_ += block.nbytes;
  }
  /// Halves all counts now and then. Order stays but for ties, so it is O(1) a use on average.
  void age() {
    if (++uses_since_aging_ < kAgingPeriod * blocks_.size()) return;
    uses_since_aging_ = 0;
    std::vector<Key> keys;
    blocks_.each([&](Key key, const Block&) { keys.push_back(key); });
    for (Key key : keys) {
      Block& block = *blocks_.find(key);
      block.num_uses = (block.num_uses + 1) / 2;
      if (const Score* score = others_.find(key)) others_.put(key, {block.num_uses, score->second});
    }
  }

  static constexpr std::uint64_t kAgingPeriod = 10;

  std::uint64_t budget_ = 0, privileged_nbytes_ = 0;
  std::uint64_t num_requests_ = 0, uses_since_aging_ = 0;
  FlatMap<Block> blocks_;
  RecencyList privileged_;  // newest first
  Ranking<Score> others_;
};

}  // namespace tiered_mem
