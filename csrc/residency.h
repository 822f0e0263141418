// What is in one tier: key -> slot, state and pins. Asks the eviction policy for victims.
//
// Residency moves no bytes and takes no locks. The runtime drives it with memory behind the
// slots; the simulator drives the same object with none. Invariants:
//   - a block is evicted only when it is ready and nobody pins it;
//   - a block in flight has a slot but isn't a hit;
//   - `admit` makes room for all the blocks it is asked for, or changes nothing.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_set>
#include <vector>

#include "arena.h"
#include "flat_map.h"
#include "policy.h"
#include "probation.h"

namespace tiered_mem {

enum class State : std::uint8_t { loading, ready, failed };

struct Block {
  Key key = 0;
  Slot slot = 0;
  std::uint64_t slot_nbytes = 0;
  std::uint64_t last_use = 0;  // on the residency's clock, that counts uses
  std::uint32_t pins = 0;
  State state = State::loading;
  bool guessed = false;     // came by a hint and no event has used it yet
  bool protected_ = false;  // hinted for an event to come: only demand may evict it
};

/// A block to make room for.
struct Wanted {
  Key key;
  std::uint64_t nbytes;
};

/// A block that had to go. Its bytes lie at `slot` until the slot's next owner is filled.
struct Victim {
  Key key;
  Slot slot;
  std::uint64_t nbytes;
  bool unused_guess;
  bool slot_reused;  // false where the whole slab went: its bytes can't be waited for
};

enum class Admission { ok, busy, too_large };

class Residency {
 public:
  Residency(Arena arena, std::unique_ptr<EvictionPolicy> policy);

  /// The block, or nullptr. Valid until the next call that isn't const.
  Block* find(Key key);

  /// Gives every wanted block a slot in state `loading` and appends the victims, all or nothing.
  /// `busy`: pins or transfers of others are in the way; `too_large`: it can never fit.
  /// A guess evicts no protected block. Throws what a plugged-in policy raises; nothing has changed
  /// then.
  Admission admit(const std::vector<Wanted>& wanted, Entry entry, std::vector<Victim>& victims);

  /// An event uses a block: the policy learns of it, and it is no guess any more.
  void use(Block& block);
  /// It can't be evicted until `unpin`.
  void pin(Block& block);
  /// Drops a failed block with its last pin.
  void unpin(Block& block);
  void mark_ready(Block& block);
  void mark_failed(Block& block);
  /// A hint for an event to come spares the block from other guesses.
  void protect(Block& block, bool on);

  /// Tells the policy that the block is the first that may go.
  void demote_rank(Block& block);
  /// Removes an unpinned block (a cancelled guess, a model that was closed).
  void drop(Block& block);

  /// Somebody still reads the bytes of a slot whose block has left: its slab stays.
  void hold(Slot slot) { held_.insert(slot); }
  void unhold(Slot slot) { held_.erase(slot); }

  /// Brings the arena to `budget`, dropping blocks if need be. False while pins hold slabs back:
  /// call again when they are gone. Appends the slabs whose memory isn't needed any more.
  bool resize(std::uint64_t budget, std::vector<Arena::Slab>& released);

  void add_range(Slot first, std::uint64_t nbytes) { arena_.add_range(first, nbytes); }
  std::optional<Slot> take_idle_range() { return arena_.take_idle_range(); }

  EvictionPolicy& policy() { return policy_.policy(); }
  const Arena& arena() const { return arena_; }
  std::size_t num_blocks() const { return blocks_.size(); }
  std::uint64_t num_evictions() const { return num_evictions_; }
  std::uint64_t nbytes_guessed() const { return nbytes_guessed_; }
  std::uint64_t nbytes_used() const { return arena_.nbytes_used(); }
  /// Whether nothing is pinned, in flight or held: then any event of at most the budget fits.
  bool quiet() const;

  template <class Visit>
  void each(Visit&& visit) {
    blocks_.each([&](Key, const std::unique_ptr<Block>& block) { visit(*block); });
  }

 private:
  bool evictable(const Block& block) const {
    return block.state == State::ready && block.pins == 0;
  }
  /// Slots by size class.
  using Need = std::map<std::uint64_t, std::uint64_t>;
  struct IdleCount {
    std::uint64_t all = 0, protected_ = 0;
  };
  using IdleCounts = std::map<std::uint64_t, IdleCount>;  // evictable blocks by slot_nbytes
  using Taken = std::map<std::uint64_t, std::vector<Slot>>;
  struct SlabUse {
    bool idle = true;
    std::vector<Key> keys;
  };

  bool take_short(Arena& arena, const IdleCounts& idle, const Need& need, bool spare_protected,
                  Taken& taken) const;
  bool make_room(const Need& need, std::vector<Victim>& victims);
  void note_victim(const Block& block);
  void balance(std::uint64_t slot_nbytes, std::vector<Victim>& victims);
  std::map<std::uint64_t, double> idle_ages() const;
  std::map<std::uint64_t, SlabUse> survey() const;
  std::uint64_t nbytes_idle() const;
  void empty_slab(std::uint64_t offset, const SlabUse& use, std::vector<Victim>& victims);
  /// How a wanted block comes by its slot: one that is free, or its victim's.
  struct Choice {
    Slot slot = 0;
    Block* victim = nullptr;
  };
  std::vector<Choice> choose_slots(const std::vector<Wanted>& wanted, Entry entry, Taken& taken);
  Block* choose_victim(const Wanted& want, bool spare_protected);
  Victim remove(Block& block, bool slot_reused);
  void forget(Block& block);
  void count_idle(const Block& block, int change);

  Arena arena_;
  Probation policy_;
  FlatMap<std::unique_ptr<Block>> blocks_;
  IdleCounts idle_;
  std::unordered_set<Slot> held_;
  // For slots of several sizes: how long ago their last victims had been used, on average, and how
  // many there were since a slab last changed its size.
  struct Pressure {
    double age = 0;
    std::uint64_t num_victims = 0;
  };
  std::map<std::uint64_t, Pressure> pressure_;
  std::uint64_t clock_ = 0;
  std::uint64_t num_evictions_ = 0;
  std::uint64_t nbytes_guessed_ = 0;
};

}  // namespace tiered_mem
