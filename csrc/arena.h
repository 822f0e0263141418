// One arena per tier: a budget of bytes, cut into slabs, slabs cut into slots of one size class.
//
// The arena only keeps accounts: a slot is an offset from the arena's base, so the same code
// serves device memory, host memory, and a simulation that has no memory at all.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

namespace tiered_mem {

/// Slots are whole pages, so that an O_DIRECT read lands in place.
constexpr std::uint64_t kPage = 4096;

inline std::uint64_t round_to_pages(std::uint64_t nbytes) {
  return (nbytes + kPage - 1) / kPage * kPage;
}

/// The most slots of one slab: the unit in which space passes from one size class to another.
constexpr std::uint64_t kMaxSlotsPerSlab = 64;

/// Slabs of a sixteenth of the budget: small enough that one can be taken from a size class
/// without emptying it, large enough that the accounts stay small.
constexpr std::uint64_t kSlabsPerArena = 16;

/// Byte offset of a slot from its arena's base.
using Slot = std::uint64_t;

class Arena {
 public:
  struct Slab {
    std::uint64_t offset;
    std::uint64_t slot_nbytes;
    std::uint32_t num_slots;
    std::uint32_t num_used;
    std::uint64_t nbytes() const { return slot_nbytes * num_slots; }
  };

  /// One range of `reserved` bytes from offset 0, which bounds what `set_budget` may ever ask for.
  Arena(std::uint64_t budget, std::uint64_t reserved);
  /// Without memory until `add_range` tells of some.
  static Arena of_ranges(std::uint64_t budget);

  /// More memory, whose first byte is a slot's offset `first`. No slab crosses from one range to
  /// another, so each can be given back alone. Throws ConfigError if it overlaps another or isn't
  /// of whole pages.
  void add_range(Slot first, std::uint64_t nbytes);
  /// Takes out a range that no slab lies in and that the budget doesn't need; nothing if there is
  /// none. Returns its offset.
  std::optional<Slot> take_idle_range();

  /// A free slot of this size class (`slot_nbytes` is a multiple of kPage), cutting a new slab of
  /// at most `max_new` slots if need be; nothing if the budget is used up.
  std::optional<Slot> take(std::uint64_t slot_nbytes, std::uint64_t max_new = kMaxSlotsPerSlab);
  void give(Slot slot);

  /// The most slots of this class that an otherwise empty arena holds.
  std::uint64_t max_slots(std::uint64_t slot_nbytes) const;

  /// Gives the space of a slab without used slots back, for any size class.
  void release_slab(std::uint64_t slab_offset);

  const Slab& slab_of(Slot slot) const { return const_cast<Arena*>(this)->slab_at(slot); }
  const std::map<std::uint64_t, Slab>& slabs() const { return slabs_; }

  std::uint64_t budget() const { return budget_; }
  /// Bytes of all ranges.
  std::uint64_t reserved() const { return reserved_; }
  /// Bytes cut into slabs. Above the budget only between a shrink and the release of slabs.
  std::uint64_t nbytes_cut() const { return nbytes_cut_; }
  /// Bytes of taken slots. Taking one never brings them above the budget.
  std::uint64_t nbytes_used() const { return nbytes_used_; }
  void set_budget(std::uint64_t budget);

 private:
  Slab& slab_at(Slot slot);
  const Slab* carve(std::uint64_t slot_nbytes, std::uint64_t num_slots);

  std::uint64_t budget_;
  std::uint64_t reserved_ = 0;
  std::map<std::uint64_t, std::uint64_t> ranges_;  // offset -> nbytes
  std::uint64_t nbytes_cut_ = 0;
  std::uint64_t nbytes_used_ = 0;
  std::map<std::uint64_t, Slab> slabs_;                    // by offset
  std::map<std::uint64_t, std::uint64_t> holes_;           // offset -> nbytes, inside a range
  std::map<std::uint64_t, std::vector<Slot>> free_slots_;  // by slot_nbytes
};

}  // namespace tiered_mem
