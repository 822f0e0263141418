#include "residency.h"

#include <algorithm>
#include <stdexcept>

namespace tiered_mem {

Residency::Residency(Arena arena, std::unique_ptr<EvictionPolicy> policy)
    : arena_(std::move(arena)), policy_(std::move(policy)) {}

Block* Residency::find(Key key) {
  auto* found = blocks_.find(key);
  return found == nullptr ? nullptr : found->get();
}

void Residency::count_idle(const Block& block, int change) {
  if (!evictable(block)) return;
  IdleCount& count = idle_[block.slot_nbytes];
  count.all += change;
  if (block.protected_) count.protected_ += change;
}

Admission Residency::admit(const std::vector<Wanted>& wanted, Entry entry,
                           std::vector<Victim>& victims) {
  std::map<std::uint64_t, std::uint64_t> need;  // slots by size class
  for (const Wanted& block : wanted) ++need[round_to_pages(block.nbytes)];

  const bool spare_protected = entry == Entry::guessed;
  for (const auto& [slot_nbytes, num_slots] : need) {
    if (num_slots > arena_.max_slots(slot_nbytes)) return Admission::too_large;
    const std::uint64_t have =
        arena_.num_available(slot_nbytes) + num_evictable(slot_nbytes, spare_protected);
    if (have >= num_slots) continue;
    // A guess never takes a slab from another size class.
    if (spare_protected || !make_slab_room(slot_nbytes, num_slots, victims)) return Admission::busy;
  }

  for (const Wanted& want : wanted) {
    const std::uint64_t slot_nbytes = round_to_pages(want.nbytes);
    auto slot = arena_.take(slot_nbytes);
    if (!slot) {
      evict_one(slot_nbytes, spare_protected, victims);
      slot = arena_.take(slot_nbytes);
    }
    auto block = std::make_unique<Block>();
    block->key = want.key;
    block->slot = *slot;
    block->slot_nbytes = slot_nbytes;
    block->guessed = entry == Entry::guessed;
    if (block->guessed) nbytes_guessed_ += slot_nbytes;
    nbytes_used_ += slot_nbytes;
    policy_->insert(want.key, want.nbytes, entry);
    blocks_.put(want.key, std::move(block));
  }
  return Admission::ok;
}

std::uint64_t Residency::num_evictable(std::uint64_t slot_nbytes, bool spare_protected) const {
  const auto found = idle_.find(slot_nbytes);
  if (found == idle_.end()) return 0;
  return found->second.all - (spare_protected ? found->second.protected_ : 0);
}

// Protected blocks go last: first among the others, then, for demand alone, among all.
void Residency::evict_one(std::uint64_t slot_nbytes, bool spare_protected,
                          std::vector<Victim>& victims) {
  const auto choose = [&](bool spare) {
    return policy_->evict([&](Key key) {
      const Block& block = *find(key);
      return block.slot_nbytes == slot_nbytes && evictable(block) && !(spare && block.protected_);
    });
  };
  auto key = choose(true);
  if (!key && !spare_protected) key = choose(false);
  // `admit` has counted the evictable blocks, so a policy that finds none has lost one.
  if (!key) throw std::logic_error("the eviction policy returned no victim though there is one");
  victims.push_back(remove(*find(*key), true));
}

Victim Residency::remove(Block& block, bool slot_reused) {
  const Victim victim{block.key, block.slot, block.slot_nbytes, block.guessed, slot_reused};
  ++num_evictions_;
  forget(block);
  return victim;
}

void Residency::forget(Block& block) {
  count_idle(block, -1);
  if (block.guessed) nbytes_guessed_ -= block.slot_nbytes;
  nbytes_used_ -= block.slot_nbytes;
  arena_.give(block.slot);
  blocks_.erase(block.key);
}

// Another size class holds the arena: take whole slabs from it, least used first.
bool Residency::make_slab_room(std::uint64_t slot_nbytes, std::uint64_t num_slots,
                               std::vector<Victim>& victims) {
  std::vector<Arena::Slab> idle;
  for (const auto& [offset, slab] : arena_.slabs())
    if (slab.slot_nbytes != slot_nbytes && slab_is_idle(slab)) idle.push_back(slab);
  std::stable_sort(idle.begin(), idle.end(), [](const Arena::Slab& a, const Arena::Slab& b) {
    return a.num_used * a.slot_nbytes < b.num_used * b.slot_nbytes;
  });

  // Rehearse on a copy of the accounts: nothing may change if it isn't enough.
  const auto enough = [&](const Arena& arena) {
    return arena.num_available(slot_nbytes) + num_evictable(slot_nbytes, false) >= num_slots;
  };
  Arena rehearsal = arena_;
  std::size_t num_taken = 0;
  while (!enough(rehearsal)) {
    if (num_taken == idle.size()) return false;
    const Arena::Slab& slab = idle[num_taken++];
    blocks_.each([&](Key, const std::unique_ptr<Block>& block) {
      if (arena_.slab_of(block->slot).offset == slab.offset) rehearsal.give(block->slot);
    });
    rehearsal.release_slab(slab.offset);
  }
  for (std::size_t i = 0; i < num_taken; ++i) {
    empty_slab(idle[i], victims);
    arena_.release_slab(idle[i].offset);
  }
  return true;
}

bool Residency::slab_is_idle(const Arena::Slab& slab) const {
  for (Slot slot : held_)
    if (slot >= slab.offset && slot < slab.offset + slab.nbytes()) return false;
  bool idle = true;
  blocks_.each([&](Key, const std::unique_ptr<Block>& block) {
    if (arena_.slab_of(block->slot).offset == slab.offset) idle &= evictable(*block);
  });
  return idle;
}

void Residency::empty_slab(const Arena::Slab& slab, std::vector<Victim>& victims) {
  std::vector<Key> inside;
  blocks_.each([&](Key key, const std::unique_ptr<Block>& block) {
    if (arena_.slab_of(block->slot).offset == slab.offset) inside.push_back(key);
  });
  for (Key key : inside) {
    policy_->erase(key);
    victims.push_back(remove(*find(key), false));
  }
}

bool Residency::resize(std::uint64_t budget, std::vector<Arena::Slab>& released) {
  std::vector<Victim> victims;
  arena_.set_budget(budget);
  while (arena_.nbytes_cut() > budget) {
    // From the top, so that what stays is contiguous.
    const Arena::Slab* top = nullptr;
    for (auto slab = arena_.slabs().rbegin(); slab != arena_.slabs().rend() && !top; ++slab)
      if (slab_is_idle(slab->second)) top = &slab->second;
    if (top == nullptr) return false;
    const Arena::Slab slab = *top;
    empty_slab(slab, victims);
    arena_.release_slab(slab.offset);
    released.push_back(slab);
  }
  return true;
}

void Residency::use(Block& block) {
  policy_->touch(block.key);
  if (block.guessed) nbytes_guessed_ -= block.slot_nbytes;
  block.guessed = false;
  protect(block, false);
}

void Residency::protect(Block& block, bool on) {
  count_idle(block, -1);
  block.protected_ = on;
  count_idle(block, +1);
}

void Residency::pin(Block& block) {
  count_idle(block, -1);
  ++block.pins;
}

void Residency::unpin(Block& block) {
  --block.pins;
  count_idle(block, +1);
  if (block.state == State::failed && block.pins == 0) drop(block);
}

void Residency::mark_ready(Block& block) {
  block.state = State::ready;
  count_idle(block, +1);
}

void Residency::mark_failed(Block& block) {
  block.state = State::failed;
  if (block.pins == 0) drop(block);
}

void Residency::demote_rank(Block& block) {
  policy_->erase(block.key);
  policy_->insert(block.key, block.slot_nbytes, Entry::guessed);
}

void Residency::drop(Block& block) {
  policy_->erase(block.key);
  forget(block);
}

}  // namespace tiered_mem
