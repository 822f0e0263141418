#include "hints.h"

#include <algorithm>
#include <iterator>

namespace tiered_mem {

namespace {

constexpr double kMemory = 64;  // predictions of one rank that a judgement looks back on
constexpr std::size_t kMaxOpen = 1024;

}  // namespace

bool HintBook::pays(Partition partition, std::uint32_t rank) const {
  const auto found = judgements_.find(partition);
  if (found == judgements_.end() || rank >= found->second.ranks.size()) return false;
  const Rank& seen = found->second.ranks[rank];
  return seen.num_seen >= kMinSeen && seen.num_right >= kPaysFrom * seen.num_seen;
}

double HintBook::likelihood(Partition partition, std::uint32_t rank) const {
  const auto found = judgements_.find(partition);
  if (found == judgements_.end() || rank >= found->second.ranks.size()) return 0.5;
  const Rank& seen = found->second.ranks[rank];
  return (seen.num_right + 1) / (seen.num_seen + 2);
}

std::vector<Hint> HintBook::open(std::uint64_t stream, Partition partition,
                                 std::vector<Hint> hints) {
  const Slot slot{stream, partition};
  std::vector<Hint> displaced = take(stream, partition);
  if (open_.size() >= kMaxOpen) {
    const Slot oldest = order_.front();
    const auto forgotten = take(oldest.first, oldest.second);
    displaced.insert(displaced.end(), forgotten.begin(), forgotten.end());
  }
  open_.emplace(slot, std::move(hints));
  order_.push_back(slot);
  return displaced;
}

std::vector<Hint> HintBook::take(std::uint64_t stream, Partition partition) {
  const Slot slot{stream, partition};
  const auto found = open_.find(slot);
  if (found == open_.end()) return {};
  std::vector<Hint> hints = std::move(found->second);
  open_.erase(found);
  order_.erase(std::find(order_.begin(), order_.end(), slot));
  return hints;
}

void HintBook::forget(std::uint8_t space) {
  const auto drop = [space](auto& all, const auto& partition) {
    for (auto it = all.begin(); it != all.end();)
      it = space_of(Key{partition(*it)} << 32) == space ? all.erase(it) : std::next(it);
  };
  drop(judgements_, [](const auto& entry) { return entry.first; });
  drop(open_, [](const auto& entry) { return entry.first.second; });
  drop(order_, [](const Slot& slot) { return slot.second; });
}

void HintBook::judge(Partition partition, const Hint& hint, bool right) {
  if (!hint.missing || hint.rank >= kMaxRank) return;
  Judgement& judgement = judgements_[partition];
  ++judgement.num_hints;
  judgement.num_right += right;
  if (judgement.ranks.size() <= hint.rank) judgement.ranks.resize(hint.rank + 1);
  Rank& rank = judgement.ranks[hint.rank];
  if (rank.num_seen >= kMemory) {
    rank.num_seen /= 2;
    rank.num_right /= 2;
  }
  ++rank.num_seen;
  rank.num_right += right;
}

std::map<Partition, HintBook::Precision> HintBook::precision() const {
  std::map<Partition, Precision> all;
  for (const auto& [partition, judgement] : judgements_) {
    Precision& precision = all[partition];
    precision.num_hints = judgement.num_hints;
    precision.num_right = judgement.num_right;
    for (std::uint32_t rank = 0; rank < judgement.ranks.size(); ++rank)
      precision.on |= pays(partition, rank);
  }
  return all;
}

}  // namespace tiered_mem
