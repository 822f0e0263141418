// Guesses are on probation: a block that came by a hint, or stays in DRAM as a copy, goes before
// any that the policy ranks, and the policy hears of it when an event first uses it.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "policy.h"
#include "recency_list.h"

namespace tiered_mem {

/// How a block enters: because an event needs it, or on a guess.
enum class Entry { demanded, guessed };

/// A policy, with the guesses in front of it.
class Probation {
 public:
  explicit Probation(std::unique_ptr<EvictionPolicy> policy) : policy_(std::move(policy)) {}

  EvictionPolicy& policy() { return *policy_; }

  void insert(Key key, std::uint64_t nbytes, Entry entry) {
    if (entry == Entry::demanded) {
      policy_->insert(key, nbytes);
      return;
    }
    guesses_.push_front(key);
    nbytes_.put(key, nbytes);
  }
  void touch(Key key) {
    if (const std::uint64_t* found = nbytes_.find(key)) {
      const std::uint64_t nbytes = *found;
      erase(key);
      policy_->insert(key, nbytes);
    } else {
      policy_->touch(key);
    }
  }
  void erase(Key key) {
    if (guesses_.erase(key))
      nbytes_.erase(key);
    else
      policy_->erase(key);
  }
  std::optional<Key> evict(const Evictable& evictable, Key incoming) {
    const auto guess = guesses_.pop_back(evictable);
    if (!guess) return policy_->evict(evictable, incoming);
    nbytes_.erase(*guess);
    return guess;
  }

 private:
  std::unique_ptr<EvictionPolicy> policy_;
  RecencyList guesses_;
  FlatMap<std::uint64_t> nbytes_;
};

}  // namespace tiered_mem
