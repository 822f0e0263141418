// How often keys were used of late, in four bits a counter: what admission by frequency asks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "key.h"

namespace tiered_mem {

/// A count-min sketch with four rows and conservative updates, in which all counters are halved
/// once ten uses a block have been counted. A key's four counters share one cache line. Source:
/// TinyLFU (Einziger, Friedman and Manes, 2017); packing and sample size as in Caffeine.
class FrequencySketch {
 public:
  FrequencySketch() : words_(kLineWords) {}

  /// Makes room for so many blocks, with all that was counted.
  void reserve(std::size_t num_blocks) {
    num_blocks_ = std::max(num_blocks_, num_blocks);
    // Each key finds its counters again, whatever the next bit of its hash: both halves have them.
    while (words_.size() < num_blocks_ * kWordsPerBlock) {
      const std::size_t size = words_.size();
      words_.resize(2 * size);
      std::copy_n(words_.begin(), size, words_.begin() + size);
    }
  }

  /// At most 15.
  unsigned estimate(Key key) const {
    const Place place(key, words_.size());
    unsigned least = kMaxCount;
    for (unsigned row = 0; row < kNumRows; ++row) least = std::min(least, count(place, row));
    return least;
  }

  void add(Key key) {
    const Place place(key, words_.size());
    const unsigned least = estimate(key);
    if (least < kMaxCount)
      for (unsigned row = 0; row < kNumRows; ++row)
        if (count(place, row) == least) words_[place.word(row)] += 1ull << place.shift(row);
    if (++num_uses_ >= kSample * num_blocks_) halve();
  }

 private:
  static constexpr unsigned kNumRows = 4, kMaxCount = 15, kSample = 10;
  static constexpr std::size_t kLineWords = 8, kWordsPerBlock = 1;

  struct Place {
    Place(Key key, std::size_t num_words) {
      std::uint64_t hash = (key ^ key >> 32) * 0xD6E8FEB86659FD93ull;
      hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93ull;
      bits = hash >> 8;
      line = (hash >> 36) * kLineWords & (num_words - 1);
    }
    std::size_t word(unsigned row) const { return line + 2 * row + (bits >> 5 * row & 1); }
    unsigned shift(unsigned row) const { return (bits >> (5 * row + 1) & 15) * 4; }
    std::uint64_t bits;
    std::size_t line;
  };

  unsigned count(const Place& place, unsigned row) const {
    return words_[place.word(row)] >> place.shift(row) & kMaxCount;
  }
  void halve() {
    for (std::uint64_t& word : words_) word = word >> 1 & 0x7777777777777777ull;
    num_uses_ /= 2;
  }

  std::vector<std::uint64_t> words_;
  std::size_t num_blocks_ = 1;
  std::size_t num_uses_ = 0;
};

}  // namespace tiered_mem
