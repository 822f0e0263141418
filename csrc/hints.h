// What was predicted, and how often it came true.
//
// A hint moves nothing by itself. Whether hints of a rank are worth a transfer is learned per
// partition (a layer) from the predictions themselves, those that caused no transfer included:
// a predictor that doesn't pay is switched off without having cost a byte, and comes back on
// when it would pay.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "key.h"

namespace tiered_mem {

struct Hint {
  Key key;
  std::uint32_t rank;  // 0 is the likeliest of its event
  bool missing;        // wasn't in the tier when the hint came
};

class HintBook {
 public:
  /// The share of right guesses from which a transfer pays, and how many predictions of a rank
  /// must have been seen before it is judged. A wrong guess costs
  /// little: it moves while the link would idle, lets demand through at the next piece, and leaves
  /// first. What it costs is the block that it pushes out, which may be worth as much.
  static constexpr double kPaysFrom = 0.35;
  static constexpr double kMinSeen = 4;
  static constexpr std::uint32_t kMaxRank = 64;

  bool pays(Partition partition, std::uint32_t rank) const;
  /// The share of hints of this rank that came true lately; one half before any was judged.
  double likelihood(Partition partition, std::uint32_t rank) const;

  /// Keeps the hints for the next event of `partition` in `stream` (a sequence of events, such
  /// as one thread's). Returns hints that this displaces.
  std::vector<Hint> open(std::uint64_t stream, Partition partition, std::vector<Hint> hints);
  /// The hints for the event that now comes, if any.
  std::vector<Hint> take(std::uint64_t stream, Partition partition);
  /// Forgets a model that was closed.
  void forget(std::uint8_t space);
  /// `hint` has come true or not.
  void judge(Partition partition, const Hint& hint, bool right);

  struct Precision {
    std::uint64_t num_hints = 0;  // of blocks that were missing
    std::uint64_t num_right = 0;
    bool on = false;
  };
  std::map<Partition, Precision> precision() const;

 private:
  struct Rank {
    double num_seen = 0, num_right = 0;  // decayed, so that it follows the text
  };
  struct Judgement {
    std::vector<Rank> ranks;
    std::uint64_t num_hints = 0, num_right = 0;
  };
  using Slot = std::pair<std::uint64_t, Partition>;

  std::map<Partition, Judgement> judgements_;
  std::map<Slot, std::vector<Hint>> open_;
  std::deque<Slot> order_;  // oldest first: streams that went away are forgotten
};

}  // namespace tiered_mem
