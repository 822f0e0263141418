#pragma once

#include <algorithm>

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// ARC: one list of blocks used once and one of blocks used again, each with a ghost list of what
/// it lost. A miss that is found among the ghosts moves the target between the two lists.
/// Lengths are in bytes; the target moves by the missed block's size times the ghost lists' ratio.
/// Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003.
class Arc final : public EvictionPolicy {
 public:
  void set_budget(std::uint64_t nbytes) override {
    budget_ = nbytes;
    target_ = std::min(target_, static_cast<double>(budget_));
    drop_ghosts();
  }
  void insert(Key key, std::uint64_t nbytes) override {
    adapt(key);
    adapted_for_ = kNoKey;
    if (const auto ghost = blocks_.find(key))
      blocks_.move(ghost, kAgain, nbytes);
    else
      blocks_.add(kOnce, key, nbytes);
    drop_ghosts();
  }
  bool touch(Key key) override {
    const auto id = blocks_.find(key);
    if (id == 0 || is_ghost(id)) return false;
    blocks_.move(id, kAgain);
    return true;
  }
  void erase(Key key) override {
    const auto id = blocks_.find(key);
    if (id != 0 && !is_ghost(id)) blocks_.remove(id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key incoming) override {
    adapt(incoming);
    const auto ghost = incoming == kNoKey ? 0 : blocks_.find(incoming);
    const bool in_lost_again = ghost != 0 && blocks_[ghost].list == kLostAgain;
    const auto once = static_cast<double>(blocks_.nbytes(kOnce));
    const List first = once > target_ || (in_lost_again && once == target_) ? kOnce : kAgain;
    for (const List list : {first, first == kOnce ? kAgain : kOnce}) {
      const auto id = blocks_.oldest(list, evictable);
      if (id == 0) continue;
      blocks_.move(id, list == kOnce ? kLostOnce : kLostAgain);
      return blocks_[id].key;
    }
    return std::nullopt;
  }
  std::size_t size() const override { return blocks_.size(kOnce) + blocks_.size(kAgain); }
  void prefetch(Key key) const { blocks_.prefetch(key); }

 private:
  enum List : std::uint32_t { kOnce, kAgain, kLostOnce, kLostAgain, kNumLists };
  struct NoNote {};
  using Blocks = BlockLists<kNumLists, NoNote>;

  bool is_ghost(Blocks::Id id) const { return blocks_[id].list >= kLostOnce; }

  // Once for every miss, before the first of its victims is chosen.
  void adapt(Key incoming) {
    if (incoming == kNoKey || incoming == adapted_for_) return;
    adapted_for_ = incoming;
    const auto ghost = blocks_.find(incoming);
    if (ghost == 0) return;
    const auto lost_once = static_cast<double>(blocks_.nbytes(kLostOnce));
    const auto lost_again = static_cast<double>(blocks_.nbytes(kLostAgain));
    const auto nbytes = static_cast<double>(blocks_[ghost].nbytes);
    if (blocks_[ghost].list == kLostOnce)
      target_ += nbytes * std::max(lost_again / lost_once, 1.0);
    else
      target_ -= nbytes * std::max(lost_once / lost_again, 1.0);
    target_ = std::clamp(target_, 0.0, static_cast<double>(budget_));
  }

  // Of the blocks used once we know at most a budget, of all two.
  void drop_ghosts() {
    const auto drop = [this](List ghosts) { blocks_.remove(blocks_.oldest(ghosts)); };
    while (blocks_.size(kLostOnce) > 0 &&
           blocks_.nbytes(kOnce) + blocks_.nbytes(kLostOnce) > budget_)
      drop(kLostOnce);
    while (blocks_.size(kLostAgain) > 0 && known() > 2 * budget_) drop(kLostAgain);
  }
  std::uint64_t known() const {
    return blocks_.nbytes(kOnce) + blocks_.nbytes(kAgain) + blocks_.nbytes(kLostOnce) +
           blocks_.nbytes(kLostAgain);
  }

  Blocks blocks_;
  std::uint64_t budget_ = 0;
  double target_ = 0;  // of the bytes used once
  Key adapted_for_ = kNoKey;
};

}  // namespace tiered_mem
