#pragma once

#include <algorithm>
#include <utility>

#include "flat_map.h"
#include "policy.h"
#include "ranking.h"

namespace tiered_mem {

/// GreedyDual-Size-Frequency (Cherkasova, HPL-98-69, 1998): evicts the block with the lowest
/// clock + uses * cost / nbytes. The clock is the value of the last victim, so what isn't used any
/// more is overtaken in the end.
///
/// The cost of a miss is the time to bring the block back: a start-up time and its bytes at the
/// link's speed, hence proportional to kStartNbytes + nbytes. Small blocks are worth more a byte,
/// large ones count by bytes.
class Gdsf final : public EvictionPolicy {
 public:
  /// What a link moves in the time that a transfer takes to start: 80 us at 3 GB/s (NVMe), 5 us at
  /// 50 GB/s (PCIe 5).
  static constexpr double kStartNbytes = 256 * 1024;

  void insert(Key key, std::uint64_t nbytes) override {
    const double gain = (kStartNbytes + nbytes) / std::max<double>(nbytes, 1);
    blocks_.put(key, {0, gain});
    use(key);
  }
  bool touch(Key key) override {
    if (!ranking_.contains(key)) return false;
    use(key);
    return true;
  }
  void erase(Key key) override {
    ranking_.erase(key);
    blocks_.erase(key);
  }
  std::optional<Key> evict(const Evictable& evictable, Key) override {
    const auto key = ranking_.lowest(evictable);
    if (!key) return std::nullopt;
    // A pinned block may have been spared and go later: the clock doesn't run backwards.
    clock_ = std::max(clock_, ranking_.find(*key)->first);
    erase(*key);
    return key;
  }
  std::size_t size() const override { return ranking_.size(); }

 private:
  struct Block {
    double num_uses = 0;
    double gain = 0;  // time saved by a hit, per byte held
  };
  using Score = std::pair<double, std::uint64_t>;  // value, then the time of the last use

  void use(Key key) {
    Block& block = *blocks_.find(key);
    block.num_uses += 1;
    ranking_.put(key, {clock_ + block.num_uses * block.gain, ++num_requests_});
  }

  double clock_ = 0;
  std::uint64_t num_requests_ = 0;
  FlatMap<Block> blocks_;
  Ranking<Score> ranking_;
};

}  // namespace tiered_mem
