// What computing may still read in HBM: copies into it come after that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "arena.h"
#include "device.h"

namespace tiered_mem {

/// Bytes and the points in each compute stream's work behind their last use there. By bytes, since
/// a slab may be cut into other slots; by stream, since one stream's point says nothing of another.
/// A use stays known until its stream uses the bytes anew: a copy that was to follow it may be
/// cancelled, and then the next has to.
class LastUses {
 public:
  /// `reached` tells of marks that needn't be kept any more.
  template <class Reached>
  void add(Slot first, std::uint64_t nbytes, Compute compute, const MarkPtr& mark,
           const Reached& reached) {
    Marks marks;
    for (auto& [begin, use] : take(first, nbytes))
      for (const auto& [stream, old] : use.marks)
        // A stream's later point has the earlier.
        if (stream != compute && !reached(old)) keep(marks, stream, old);
    keep(marks, compute, mark);
    uses_[first] = {first + nbytes, std::move(marks)};
  }

  std::vector<MarkPtr> of(Slot first, std::uint64_t nbytes) const {
    std::vector<MarkPtr> marks;
    for (auto use = first_behind(first); use != uses_.end() && use->first < first + nbytes; ++use)
      for (const auto& [stream, mark] : use->second.marks)
        if (std::find(marks.begin(), marks.end(), mark) == marks.end()) marks.push_back(mark);
    return marks;
  }

  std::vector<MarkPtr> all() const { return of(0, UINT64_MAX); }
  void forget(Slot first, std::uint64_t nbytes) { take(first, nbytes); }

 private:
  using Marks = std::vector<std::pair<Compute, MarkPtr>>;
  struct Use {
    Slot end;
    Marks marks;
  };
  using Uses = std::map<Slot, Use>;  // disjoint

  // Of two points of a stream, in parts of the same bytes, it isn't known which is later.
  static void keep(Marks& marks, Compute compute, const MarkPtr& mark) {
    const std::pair<Compute, MarkPtr> use{compute, mark};
    if (std::find(marks.begin(), marks.end(), use) == marks.end()) marks.push_back(use);
  }

  Uses::const_iterator first_behind(Slot first) const {
    auto use = uses_.upper_bound(first);
    if (use != uses_.begin() && std::prev(use)->second.end > first) --use;
    return use;
  }

  // Cuts the range out.
  Uses take(Slot first, std::uint64_t nbytes) {
    const Slot end = first + nbytes;
    Uses taken;
    for (auto use = first_behind(first); use != uses_.end() && use->first < end;) {
      const Slot begin = use->first;
      const Use whole = use->second;
      use = uses_.erase(use);
      if (begin < first) uses_[begin] = {first, whole.marks};
      if (whole.end > end) uses_[end] = whole;
      taken[std::max(begin, first)] = {std::min(whole.end, end), whole.marks};
    }
    return taken;
  }

  Uses uses_;
};

}  // namespace tiered_mem
