#include "arena.h"

#include <algorithm>
#include <stdexcept>

namespace tiered_mem {

namespace {

// Slabs of a sixteenth of the budget: small enough that one can be taken from a size class
// without emptying it, large enough that the accounts stay small.
constexpr std::uint64_t kSlabsPerArena = 16;
constexpr std::uint64_t kMaxSlotsPerSlab = 64;

}  // namespace

Arena::Arena(std::uint64_t budget, std::uint64_t reserved)
    : budget_(budget), reserved_(round_to_pages(std::max(budget, reserved))) {
  holes_[0] = reserved_;
}

std::optional<Slot> Arena::take(std::uint64_t slot_nbytes) {
  std::vector<Slot>& free = free_slots_[slot_nbytes];
  if (free.empty()) {
    const std::uint64_t wanted =
        std::clamp(budget_ / kSlabsPerArena / slot_nbytes, std::uint64_t{1}, kMaxSlotsPerSlab);
    const std::uint64_t room = budget_ > nbytes_cut_ ? (budget_ - nbytes_cut_) / slot_nbytes : 0;
    const std::uint64_t num_slots = std::min(wanted, room);
    if (num_slots == 0) return std::nullopt;
    auto offset = carve(slot_nbytes, num_slots);
    if (!offset) return std::nullopt;
    // Lowest offset last, so that slots are given out in ascending order.
    for (std::uint64_t i = num_slots; i-- > 0;) free.push_back(*offset + i * slot_nbytes);
  }
  const Slot slot = free.back();
  free.pop_back();
  ++const_cast<Slab&>(slab_of(slot)).num_used;
  return slot;
}

std::optional<std::uint64_t> Arena::carve(std::uint64_t slot_nbytes, std::uint64_t num_slots) {
  const std::uint64_t nbytes = slot_nbytes * num_slots;
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    if (hole->second < nbytes) continue;
    const auto [offset, size] = *hole;
    holes_.erase(hole);
    if (size > nbytes) holes_[offset + nbytes] = size - nbytes;
    slabs_[offset] = Slab{offset, slot_nbytes, static_cast<std::uint32_t>(num_slots), 0};
    nbytes_cut_ += nbytes;
    return offset;
  }
  if (num_slots > 1) return carve(slot_nbytes, num_slots / 2);
  return std::nullopt;
}

void Arena::give(Slot slot) {
  Slab& slab = const_cast<Slab&>(slab_of(slot));
  --slab.num_used;
  free_slots_[slab.slot_nbytes].push_back(slot);
}

std::uint64_t Arena::num_available(std::uint64_t slot_nbytes) const {
  const auto free = free_slots_.find(slot_nbytes);
  std::uint64_t total = free == free_slots_.end() ? 0 : free->second.size();
  std::uint64_t room = budget_ > nbytes_cut_ ? (budget_ - nbytes_cut_) / slot_nbytes : 0;
  std::uint64_t fits = 0;
  for (const auto& [offset, nbytes] : holes_) {
    fits += nbytes / slot_nbytes;
    if (fits >= room) break;
  }
  return total + std::min(room, fits);
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
  if (const auto after = std::next(hole);
      after != holes_.end() && hole->first + hole->second == after->first) {
    hole->second += after->second;
    holes_.erase(after);
  }
  if (hole == holes_.begin()) return;
  const auto before = std::prev(hole);
  if (before->first + before->second != hole->first) return;
  before->second += hole->second;
  holes_.erase(hole);
}

const Arena::Slab& Arena::slab_of(Slot slot) const {
  auto found = slabs_.upper_bound(slot);
  if (found == slabs_.begin()) throw std::logic_error("slab_of: not a slot");
  return (--found)->second;
}

void Arena::set_budget(std::uint64_t budget) {
  if (budget > reserved_) throw std::invalid_argument("budget above what was reserved");
  budget_ = budget;
}

}  // namespace tiered_mem
