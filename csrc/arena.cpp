#include "arena.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "error.h"

namespace tiered_mem {

Arena::Arena(std::uint64_t budget, std::uint64_t reserved) : budget_(budget) {
  const std::uint64_t nbytes = round_to_pages(std::max(budget, reserved));
  if (nbytes < budget) throw BudgetError("a budget of that many bytes can't be addressed");
  if (nbytes > 0) add_range(0, nbytes);
}

Arena Arena::of_ranges(std::uint64_t budget) {
  Arena arena(0, 0);
  arena.budget_ = budget;
  return arena;
}

void Arena::add_range(Slot first, std::uint64_t nbytes) {
  if (first % kPage != 0 || nbytes % kPage != 0 || nbytes == 0)
    throw ConfigError("a range of memory has whole pages of " + std::to_string(kPage) + " bytes");
  const auto after = ranges_.lower_bound(first);
  const bool overlaps =
      (after != ranges_.end() && first + nbytes > after->first) ||
      (after != ranges_.begin() && std::prev(after)->first + std::prev(after)->second > first);
  if (overlaps) throw ConfigError("a range of memory overlaps one that the arena has already");
  ranges_[first] = nbytes;
  holes_[first] = nbytes;
  reserved_ += nbytes;
}

std::optional<Slot> Arena::take_idle_range() {
  for (auto range = ranges_.rbegin(); range != ranges_.rend(); ++range) {
    const auto [first, nbytes] = *range;
    const auto hole = holes_.find(first);
    if (hole == holes_.end() || hole->second != nbytes || reserved_ - nbytes < budget_) continue;
    holes_.erase(hole);
    ranges_.erase(first);
    reserved_ -= nbytes;
    return first;
  }
  return std::nullopt;
}

std::uint64_t Arena::max_slots(std::uint64_t slot_nbytes) const {
  std::uint64_t num_slots = 0;
  for (const auto& [first, nbytes] : ranges_) num_slots += nbytes / slot_nbytes;
  return std::min(num_slots, budget_ / slot_nbytes);
}

std::optional<Slot> Arena::take(std::uint64_t slot_nbytes, std::uint64_t max_new) {
  // After a shrink there may be free slots in slabs that couldn't go yet: they stay unused.
  if (nbytes_used_ + slot_nbytes > budget_) return std::nullopt;
  std::vector<Slot>& free = free_slots_[slot_nbytes];
  if (free.empty()) {
    const std::uint64_t wanted =
        std::clamp(budget_ / kSlabsPerArena / slot_nbytes, std::uint64_t{1}, max_new);
    const std::uint64_t room = budget_ > nbytes_cut_ ? (budget_ - nbytes_cut_) / slot_nbytes : 0;
    const std::uint64_t num_slots = std::min(wanted, room);
    if (num_slots == 0) return std::nullopt;
    const Slab* slab = carve(slot_nbytes, num_slots);
    if (slab == nullptr) return std::nullopt;
    // Lowest offset last, so that slots are given out in ascending order.
    for (std::uint64_t i = slab->num_slots; i-- > 0;)
      free.push_back(slab->offset + i * slot_nbytes);
  }
  const Slot slot = free.back();
  free.pop_back();
  ++slab_at(slot).num_used;
  nbytes_used_ += slot_nbytes;
  return slot;
}

// A slab of `num_slots`, or of fewer where no hole is large enough.
const Arena::Slab* Arena::carve(std::uint64_t slot_nbytes, std::uint64_t num_slots) {
  const std::uint64_t nbytes = slot_nbytes * num_slots;
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    if (hole->second < nbytes) continue;
    const auto [offset, size] = *hole;
    holes_.erase(hole);
    if (size > nbytes) holes_[offset + nbytes] = size - nbytes;
    nbytes_cut_ += nbytes;
    return &(slabs_[offset] = Slab{offset, slot_nbytes, static_cast<std::uint32_t>(num_slots), 0});
  }
  return num_slots > 1 ? carve(slot_nbytes, num_slots / 2) : nullptr;
}

void Arena::give(Slot slot) {
  Slab& slab = slab_at(slot);
  --slab.num_used;
  nbytes_used_ -= slab.slot_nbytes;
  free_slots_[slab.slot_nbytes].push_back(slot);
}

void Arena::release_slab(std::uint64_t slab_offset) {
  const auto found = slabs_.find(slab_offset);
  if (found == slabs_.end() || found->second.num_used != 0)
    throw std::logic_error("release_slab: the slab doesn't exist or is in use");
  const Slab slab = found->second;
  slabs_.erase(found);
  nbytes_cut_ -= slab.nbytes();
  std::vector<Slot>& free = free_slots_[slab.slot_nbytes];
  const auto inside = [&](Slot s) { return s >= slab.offset && s < slab.offset + slab.nbytes(); };
  free.erase(std::remove_if(free.begin(), free.end(), inside), free.end());

  // Merge with the holes on both sides, so that a larger class can use the space.
  auto hole = holes_.emplace(slab.offset, slab.nbytes()).first;
  if (const auto after = std::next(hole); after != holes_.end() &&
                                          hole->first + hole->second == after->first &&
                                          ranges_.count(after->first) == 0) {
    hole->second += after->second;
    holes_.erase(after);
  }
  if (hole == holes_.begin() || ranges_.count(hole->first) > 0) return;
  const auto before = std::prev(hole);
  if (before->first + before->second != hole->first) return;
  before->second += hole->second;
  holes_.erase(hole);
}

Arena::Slab& Arena::slab_at(Slot slot) {
  auto found = slabs_.upper_bound(slot);
  if (found == slabs_.begin()) throw std::logic_error("slab_at: not a slot");
  return (--found)->second;
}

void Arena::set_budget(std::uint64_t budget) {
  if (budget > reserved_)
    throw BudgetError("a budget of " + std::to_string(budget) + " bytes is above the " +
                      std::to_string(reserved_) + " bytes that were reserved at the start");
  budget_ = budget;
}

}  // namespace tiered_mem
