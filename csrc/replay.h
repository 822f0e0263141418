// The count-only replay: a policy alone, flat requests, no residency, events or bytes. What it
// counts is what a tier of equal slots counts when every request is an event of its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "error.h"
#include "flat_map.h"
#include "policy.h"

namespace tiered_mem {

/// Requests in order. Views: the arrays live elsewhere.
struct Requests {
  const Key* keys;
  const std::uint64_t* nbytes;  // of each request's block; nullptr: every block has one byte
  std::size_t count;
};

/// Requests that missed, and the bytes of their blocks.
struct Misses {
  std::uint64_t requests = 0;
  std::uint64_t nbytes = 0;
};

/// Replays with a fresh policy. Throws ConfigError if there is none of this name or a key names
/// nothing, PolicyError if a plug-in misbehaves.
Misses count_misses(const std::string& spec, const Requests& requests, std::uint64_t budget);

/// Replays requests with a fresh policy of one built-in class.
using Replay = Misses (*)(const Requests& requests, std::uint64_t budget);

/// The replay of the built-in policy of this name; nullptr if there is none.
Replay find_replay(const std::string& name);

// What follows is a template, so that for a built-in policy nothing in the loop is virtual.

/// The victim, which must be there.
template <class Policy>
Key evict_one(Policy& policy, Key incoming) {
  const std::optional<Key> victim = policy.evict({}, incoming);
  if (!victim) throw PolicyError("replay: the policy named no victim though all blocks may go");
  return *victim;
}

// A policy may fetch what `touch` will look at into the CPU's caches, a few requests ahead.
template <class Policy>
auto prefetch(const Policy& policy, Key key, int) -> decltype(policy.prefetch(key)) {
  policy.prefetch(key);
}
template <class Policy>
void prefetch(const Policy&, Key, long) {}

constexpr std::size_t kPrefetchDistance = 12;

/// Calls `request(key, i)` for every request that misses.
template <class Policy, class Miss>
void replay_requests(Policy& policy, const Requests& requests, Miss&& miss) {
  for (std::size_t i = 0; i < requests.count; ++i) {
    if (i + kPrefetchDistance < requests.count)
      prefetch(policy, requests.keys[i + kPrefetchDistance], 0);
    const Key key = requests.keys[i];
    policy.begin_event(partition_of(key));
    if (!policy.touch(key)) miss(key, i);
    policy.rethrow();
  }
}

/// Blocks of one byte: the budget is a number of slots.
template <class Policy>
Misses replay_slots(Policy& policy, const Requests& requests, std::uint64_t num_slots) {
  Misses misses;
  replay_requests(policy, requests, [&](Key key, std::size_t) {
    ++misses.requests;
    if (policy.size() == num_slots) evict_one(policy, key);
    policy.insert(key, 1);
  });
  misses.nbytes = misses.requests;
  return misses;
}

/// Blocks of any size. One that is larger than the budget passes by. A resident block keeps the
/// size that it came with.
template <class Policy>
Misses replay_nbytes(Policy& policy, const Requests& requests, std::uint64_t budget) {
  Misses misses;
  FlatMap<std::uint64_t> resident;
  std::uint64_t used = 0;
  replay_requests(policy, requests, [&](Key key, std::size_t i) {
    const std::uint64_t nbytes = requests.nbytes[i];
    ++misses.requests;
    misses.nbytes += nbytes;
    if (nbytes > budget) return;
    while (used + nbytes > budget) {
      const Key victim = evict_one(policy, key);
      const std::uint64_t* freed = resident.find(victim);
      if (freed == nullptr) throw PolicyError("replay: the policy evicted a block twice");
      used -= *freed;
      resident.erase(victim);
    }
    policy.insert(key, nbytes);
    resident.put(key, nbytes);
    used += nbytes;
  });
  return misses;
}

template <class Policy>
Misses replay(Policy& policy, const Requests& requests, std::uint64_t budget) {
  policy.set_budget(budget);
  return requests.nbytes == nullptr ? replay_slots(policy, requests, budget)
                                    : replay_nbytes(policy, requests, budget);
}

}  // namespace tiered_mem
