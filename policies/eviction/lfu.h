#pragma once

#include <algorithm>
#include <utility>

#include "flat_map.h"
#include "policy.h"
#include "ranking.h"

namespace tiered_mem {

/// Least frequently used, with dynamic aging: a block ranks by its uses since it came plus the age
/// of the cache at its last use, and that age is the rank of the last victim. Equals go by the time
/// of their last use.
///
/// Plain LFU freezes on small caches of experts: what was used often once never leaves, and all
/// newcomers share one slot. Halving the counts thaws it too, but wants a period that fits the
/// routes; dynamic aging has no parameter, and did as well as the best period from a tenth of the
/// experts up.
/// Source: LFU with dynamic aging, Arlitt et al., "Evaluating content management techniques for Web
/// proxy caches", 1999. libCacheSim's LFU has no aging (the tests show that nothing else differs);
/// its LFUDA adds the age again at every use.
class Lfu final : public EvictionPolicy {
 public:
  void insert(Key key, std::uint64_t) override {
    num_uses_.put(key, 0);
    use(key);
  }
  bool touch(Key key) override {
    if (num_uses_.find(key) == nullptr) return false;
    use(key);
    return true;
  }
  void erase(Key key) override {
    ranking_.erase(key);
    num_uses_.erase(key);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    const auto key = ranking_.lowest(evictable);
    if (!key) return std::nullopt;
    // Where pinned blocks were passed over, a victim may rank below the one before.
    age_ = std::max(age_, ranking_.find(*key)->first);
    erase(*key);
    return key;
  }
  std::size_t size() const override { return num_uses_.size(); }

 private:
  using Rank = std::pair<std::uint64_t, std::uint64_t>;  // uses and age, then the time of last use

  void use(Key key) { ranking_.put(key, Rank{++*num_uses_.find(key) + age_, ++now_}); }

  std::uint64_t age_ = 0, now_ = 0;
  FlatMap<std::uint64_t> num_uses_;
  Ranking<Rank> ranking_;
};

}  // namespace tiered_mem
