// A set of positions below a known bound that finds its last member fast: a bit for every position,
// and above each 64 words of a level one word that says which of them aren't empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace tiered_mem {

class PositionSet {
 public:
  /// Of positions 0 .. bound - 1.
  explicit PositionSet(std::size_t bound) : bound_(bound) {
    do {
      levels_.emplace_back(bound / 64 + 1);  // `bound` too has a bit: a search may begin there
      bound = levels_.back().size();
    } while (bound > 1);
  }

  bool contains(std::size_t position) const {
    return levels_[0][position / 64] >> position % 64 & 1;
  }
  void insert(std::size_t position) {
    for (auto& level : levels_) {
      std::uint64_t& word = level[position / 64];
      const bool was_empty = word == 0;
      word |= std::uint64_t{1} << position % 64;
      if (!was_empty) return;
      position /= 64;
    }
  }
  void erase(std::size_t position) {
    for (auto& level : levels_) {
      std::uint64_t& word = level[position / 64];
      word &= ~(std::uint64_t{1} << position % 64);
      if (word != 0) return;
      position /= 64;
    }
  }

  std::optional<std::size_t> last() const { return last_below(bound_); }
  /// The last member below `end`.
  std::optional<std::size_t> last_below(std::size_t end) const {
    // Up to the first level with a member before `end` in end's own word, and down again.
    for (std::size_t height = 0; height < levels_.size(); ++height, end /= 64) {
      if (end % 64 == 0) continue;  // its word begins at `end`
      const std::uint64_t below = levels_[height][end / 64] & ((std::uint64_t{1} << end % 64) - 1);
      if (below == 0) continue;
      std::size_t found = end / 64 * 64 + highest_bit(below);
      while (height-- > 0) found = found * 64 + highest_bit(levels_[height][found]);
      return found;
    }
    return std::nullopt;
  }

 private:
  static std::size_t highest_bit(std::uint64_t word) { return 63 - __builtin_clzll(word); }

  std::size_t bound_;
  std::vector<std::vector<std::uint64_t>> levels_;  // the last has one word
};

}  // namespace tiered_mem
