// What no policy can beat: replays of a trace whose future is known. tiered_mem/bounds.py says what
// follows from them and why.
//
// L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace tiered_mem {

/// The events of a trace, and by access the event that uses the same block next.
class Future {
 public:
  static constexpr std::uint32_t kNever = std::numeric_limits<std::uint32_t>::max();

  /// Accesses `offsets[e]` to `offsets[e + 1]` are those of event e, each to another one of the
  /// blocks 0 to sizes.size() - 1. Throws ConfigError if they aren't.
  Future(const std::vector<std::int64_t>& offsets, std::vector<std::uint32_t> blocks,
         std::vector<std::uint64_t> sizes);

  std::size_t num_events() const { return offsets_.size() - 1; }
  std::size_t num_blocks() const { return sizes_.size(); }
  std::size_t num_accesses() const { return blocks_.size(); }
  std::size_t begin(std::size_t event) const { return offsets_[event]; }
  std::size_t end(std::size_t event) const { return offsets_[event + 1]; }
  std::uint32_t block(std::size_t access) const { return blocks_[access]; }
  std::uint64_t size(std::size_t access) const { return sizes_[blocks_[access]]; }
  std::uint32_t next(std::size_t access) const { return next_[access]; }
  /// Bytes of the accesses before `event`.
  std::uint64_t nbytes_before(std::size_t event) const { return nbytes_before_[event]; }

 private:
  std::vector<std::size_t> offsets_;
  std::vector<std::uint32_t> blocks_;
  std::vector<std::uint64_t> sizes_;
  std::vector<std::uint32_t> next_;
  std::vector<std::uint64_t> nbytes_before_;
};

struct BeladyRules {
  /// Of an event of at most so many bytes, all blocks are in the cache when it ends. Of a larger
  /// one (it runs in waves), missing blocks may pass through without taking room. 0: of all events.
  std::uint64_t pinned_nbytes = 0;
  /// Single bytes may leave, not only whole blocks.
  bool divisible = false;
};

/// A cache that lets go what is used furthest in the future.
class BeladyCache {
 public:
  BeladyCache(const Future& future, std::uint64_t capacity, BeladyRules rules);

  /// Runs one event after the one before it. Returns the bytes that were missing and, if wanted,
  /// writes those of each access, counted from the event's first.
  std::uint64_t use(std::size_t event, std::uint64_t* missing = nullptr);
  /// Starts anew as if `event` had just ended and left the best contents for the events before
  /// `end`. False if they fit as a whole, so that nothing would be missing.
  bool start_after(std::size_t event, std::size_t end);

 private:
  /// What other blocks may take when `event` ends.
  std::uint64_t room_beside(std::size_t event) const;
  void keep(std::uint32_t block, std::uint32_t next, std::uint64_t nbytes);
  void shrink(std::uint64_t limit);
  void clear();

  const Future& future_;
  std::uint64_t capacity_;
  BeladyRules rules_;
  std::vector<std::uint64_t> kept_;  // by block: bytes in the cache
  std::vector<std::uint32_t> next_;  // by block: the event of its next use, while kept
  // (next use, block), the furthest on top. An entry stands for nothing if its block isn't kept
  // or kept for another use; such ones lie below all others, since their use is past.
  std::vector<std::uint64_t> heap_;
  std::uint64_t held_ = 0;  // sum of kept_
};

/// By access, the bytes that Belady's MIN misses.
std::vector<std::uint64_t> belady(const Future& future, std::uint64_t capacity, BeladyRules rules);

struct Pace {
  double bytes_per_second = 0;
  double latency = 0;
};

/// A lower bound on the seconds in which the events can run one after another, event e working for
/// `work[e]` seconds, if all bytes come over one link and the cache is empty at first.
double least_seconds(const Future& future, std::uint64_t capacity, std::uint64_t pinned_nbytes,
                     Pace link, const std::vector<double>& work);

}  // namespace tiered_mem
