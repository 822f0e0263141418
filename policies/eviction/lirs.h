#pragma once

#include <algorithm>

#include "block_lists.h"
#include "policy.h"

namespace tiered_mem {

/// LIRS: blocks with a short time between their last two uses (LIR) stay; the others (HIR) have a
/// hundredth of the bytes, at least one block, and are the victims. The stack orders all blocks by
/// their last use, the non-resident ones among them, down to the oldest LIR block; an HIR block
/// used while it is still in the stack takes the place of that one. The stack remembers blocks of
/// at most twice the budget.
/// Source: Jiang and Zhang, "LIRS: an efficient low inter-reference recency set replacement
/// policy", SIGMETRICS 2002. libCacheSim's LIRS differs where a block that is HIR and not in the
/// stack is hit: it sends a LIR block away for it, here (as in the paper) it moves to the end of
/// the queue.
class Lirs final : public EvictionPolicy {
 public:
  void set_budget(std::uint64_t nbytes) override {
    budget_ = capacity_ = nbytes;
    tidy();
  }
  void insert(Key key, std::uint64_t nbytes) override {
    largest_ = std::max(largest_, nbytes);
    capacity_ = std::max(capacity_, held() + nbytes);
    if (const auto ghost = stack_.find(key)) {  // sooner again than the oldest LIR block
      queue_.remove(queue_.find(key));
      stack_.move(ghost, kStack, nbytes);
      make_lir(ghost);
    } else {
      const auto id = stack_.add(kStack, key, nbytes);
      if (lir_nbytes_ + nbytes <= lir_limit())
        make_lir(id);
      else
        queue_.add(kResident, key, nbytes);
    }
    tidy();
  }
  bool touch(Key key) override {
    const auto in_stack = stack_.find(key);
    if (in_stack != 0 && stack_[in_stack].note.is_lir) {
      stack_.move(in_stack, kStack);
      tidy();
      return true;
    }
    const auto in_queue = queue_.find(key);
    if (in_queue == 0 || queue_[in_queue].list == kGhost) return false;
    if (in_stack != 0) {
      queue_.remove(in_queue);
      stack_.move(in_stack, kStack);
      make_lir(in_stack);
    } else {
      queue_.move(in_queue, kResident);
      stack_.add(kStack, key, queue_[in_queue].nbytes);
    }
    tidy();
    return true;
  }
  void erase(Key key) override {
    const auto in_stack = stack_.find(key), in_queue = queue_.find(key);
    if (in_queue != 0 && queue_[in_queue].list == kGhost) return;
    if (in_queue != 0) queue_.remove(in_queue);
    if (in_stack != 0) leave_stack(in_stack);
    tidy();
  }
  std::optional<Key> evict(const Evictable& evictable, Key incoming) override {
    capacity_ = held();
    if (const auto id = queue_.oldest(kResident, evictable)) {
      const Key key = queue_[id].key;
      if (stack_.find(key) != 0)
        queue_.move(id, kGhost);
      else
        queue_.remove(id);
      if (incoming == kNoKey) tidy();  // or after its insert: it may be the oldest ghost
      return key;
    }
    for (auto id = stack_.oldest(kStack); id != kStack; id = stack_[id].newer) {
      const Key key = stack_[id].key;
      if (!stack_[id].note.is_lir || !evictable(key)) continue;
      leave_stack(id);
      prune();
      return key;
    }
    return std::nullopt;
  }
  std::size_t size() const override { return num_lir_ + queue_.size(kResident); }

 private:
  // LIR blocks are in the stack alone, ghosts in the stack and in the queue of ghosts, resident HIR
  // blocks in the queue and, while they were used later than the oldest LIR block, in the stack.
  enum : std::uint32_t { kStack, kNumStacks };
  enum : std::uint32_t { kResident, kGhost, kNumQueues };
  struct NoNote {};
  struct Note {
    bool is_lir = false;
  };
  using Stack = BlockLists<kNumStacks, Note>;

  std::uint64_t held() const { return lir_nbytes_ + queue_.nbytes(kResident); }
  std::uint64_t lir_limit() const {
    const std::uint64_t num_hir = capacity_ / 100 / largest_;
    return capacity_ - std::min(capacity_, largest_ * std::max<std::uint64_t>(num_hir, 1));
  }

  void make_lir(Stack::Id id) {
    stack_[id].note.is_lir = true;
    lir_nbytes_ += stack_[id].nbytes;
    ++num_lir_;
    prune();
    while (lir_nbytes_ > lir_limit()) {
      const auto oldest = stack_.oldest(kStack);
      queue_.add(kResident, stack_[oldest].key, stack_[oldest].nbytes);
      leave_stack(oldest);
      prune();
    }
  }
  void leave_stack(Stack::Id id) {
    if (stack_[id].note.is_lir) {
      lir_nbytes_ -= stack_[id].nbytes;
      --num_lir_;
    }
    stack_.remove(id);
  }
  // The stack ends with a LIR block.
  void prune() {
    for (auto id = stack_.oldest(kStack); id != kStack; id = stack_.oldest(kStack)) {
      if (stack_[id].note.is_lir) return;
      const auto in_queue = queue_.find(stack_[id].key);
      if (queue_[in_queue].list == kGhost) queue_.remove(in_queue);
      stack_.remove(id);
    }
  }
  void tidy() {
    prune();
    while (stack_.nbytes(kStack) > 2 * budget_ && queue_.size(kGhost) > 0)
      stack_.remove(stack_.find(queue_.remove(queue_.oldest(kGhost))));
  }

  Stack stack_;
  BlockLists<kNumQueues, NoNote> queue_;
  std::uint64_t lir_nbytes_ = 0;
  std::size_t num_lir_ = 0;
  std::uint64_t largest_ = 0;
  std::uint64_t budget_ = 0;
  // What there is room for: the budget until the first eviction tells that guesses or blocks of
  // other sizes take a part of it.
  std::uint64_t capacity_ = 0;
};

}  // namespace tiered_mem
