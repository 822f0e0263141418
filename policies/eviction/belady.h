#pragma once

#include <utility>
#include <vector>

#include "block_lists.h"
#include "error.h"
#include "flat_map.h"
#include "policy.h"
#include "position_set.h"

namespace tiered_mem {

/// Belady's MIN with forced admission: evicts the block whose next use is farthest. It has to be
/// told the future, so only the simulator has it. With blocks of equal size and no prefetch no
/// policy that admits every miss does better.
/// Source: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
class Belady final : public EvictionPolicy {
 public:
  /// `future` has the key of every use to come, in order. A use is a touch of a resident block or
  /// the insert of a missing one; within an event their order doesn't matter. What is used oftener
  /// than the future says counts as never used again. Throws ConfigError if it is too long.
  explicit Belady(std::vector<Key> future)
      : future_(std::move(future)), next_(future_.size()), waiting_(future_.size()) {
    if (future_.size() >= kNever) throw ConfigError("belady: more than 2^32 - 2 uses");
    for (std::size_t i = future_.size(); i-- > 0;) {
      if (i >= kPrefetch) upcoming_.prefetch(future_[i - kPrefetch]);
      Upcoming& upcoming = upcoming_[future_[i]];
      next_[i] = std::exchange(upcoming.position, static_cast<Position>(i));
    }
  }

  void insert(Key key, std::uint64_t nbytes) override {
    wait(key, advance(upcoming_[key]), nbytes);
  }
  bool touch(Key key) override {
    Upcoming* upcoming = upcoming_.find(key);
    if (upcoming == nullptr) return false;
    if (upcoming->position == kNever) return finished_.find(key) != 0;
    if (!waiting_.contains(upcoming->position)) return false;
    waiting_.erase(upcoming->position);
    --num_waiting_;
    wait(key, advance(*upcoming), 0);
    return true;
  }
  void erase(Key key) override {
    const Upcoming* upcoming = upcoming_.find(key);
    if (upcoming == nullptr) return;
    if (upcoming->position == kNever) {
      if (const auto id = finished_.find(key)) finished_.remove(id);
    } else if (waiting_.contains(upcoming->position)) {
      waiting_.erase(upcoming->position);
      --num_waiting_;
    }
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    if (const auto id = finished_.oldest(0, evictable)) return finished_.remove(id);
    for (auto position = waiting_.last(); position; position = waiting_.last_below(*position)) {
      if (!evictable(future_[*position])) continue;
      waiting_.erase(*position);
      --num_waiting_;
      return future_[*position];
    }
    return std::nullopt;
  }
  std::size_t size() const override { return num_waiting_ + finished_.size(0); }
  void prefetch(Key key) const { upcoming_.prefetch(key); }

 private:
  using Position = std::uint32_t;
  static constexpr Position kNever = ~Position{0};
  static constexpr std::size_t kPrefetch = 16;

  struct Upcoming {
    Position position = kNever;  // of the key's first use to come
  };
  struct NoNote {};

  /// Returns the use after the one that is made now.
  Position advance(Upcoming& upcoming) {
    if (upcoming.position != kNever) upcoming.position = next_[upcoming.position];
    return upcoming.position;
  }
  void wait(Key key, Position position, std::uint64_t nbytes) {
    if (position == kNever) {
      finished_.add(0, key, nbytes);
    } else {
      waiting_.insert(position);
      ++num_waiting_;
    }
  }

  std::vector<Key> future_;
  std::vector<Position> next_;  // the same key's use after this one
  FlatMap<Upcoming> upcoming_;
  // A resident block is known by the position of its next use, or is among the finished.
  PositionSet waiting_;
  std::size_t num_waiting_ = 0;
  BlockLists<1, NoNote> finished_;
};

}  // namespace tiered_mem
