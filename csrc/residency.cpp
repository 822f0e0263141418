#include "residency.h"

#include <algorithm>
#include <stdexcept>

namespace tiered_mem {

namespace {

constexpr double kAgeWindow = 32;   // victims that an average looks back on
constexpr double kMuchOlder = 1.3;  // ages that differ by less are left alone: a move costs a slab

}  // namespace

Residency::Residency(Arena arena, std::unique_ptr<EvictionPolicy> policy)
    : arena_(std::move(arena)), policy_(std::move(policy)) {
  policy_.policy().set_budget(arena_.budget());
}

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
  Need need;
  std::uint64_t nbytes = 0;
  for (const Wanted& block : wanted) {
    ++need[round_to_pages(block.nbytes)];
    nbytes += round_to_pages(block.nbytes);
  }
  if (nbytes > arena_.budget()) return Admission::too_large;
  // After a shrink, until enough pins are gone.
  if (nbytes > 0 && arena_.nbytes_used() > arena_.budget()) return Admission::busy;

  // First the slots that evictions of their class can't supply; from then on nothing can fail.
  const bool spare_protected = entry == Entry::guessed;
  Taken taken;
  if (!take_short(arena_, idle_, need, spare_protected, taken)) {
    // A guess never takes a slab from another size class.
    if (spare_protected || nbytes > arena_.budget() - arena_.nbytes_used() + nbytes_idle() ||
        !make_room(need, victims))
      return Admission::busy;
    taken.clear();
    if (!take_short(arena_, idle_, need, spare_protected, taken))
      throw std::logic_error("admit: the room that was made isn't there");
  }

  const std::vector<Choice> choices = choose_slots(wanted, entry, taken);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    auto block = std::make_unique<Block>();
    block->key = wanted[i].key;
    block->slot_nbytes = round_to_pages(wanted[i].nbytes);
    block->slot = choices[i].slot;
    if (choices[i].victim != nullptr) {
      if (entry == Entry::demanded) note_victim(*choices[i].victim);
      victims.push_back(remove(*choices[i].victim, true));
      block->slot = arena_.take(block->slot_nbytes).value();
    }
    block->last_use = ++clock_;
    block->guessed = entry == Entry::guessed;
    if (block->guessed) nbytes_guessed_ += block->slot_nbytes;
    blocks_.put(wanted[i].key, std::move(block));
  }
  if (entry == Entry::demanded && need.size() == 1) balance(need.begin()->first, victims);
  return Admission::ok;
}

// The policy's part of an admission: it learns of each block right after it chose the victim for
// it. A policy that throws leaves all as it was.
std::vector<Residency::Choice> Residency::choose_slots(const std::vector<Wanted>& wanted,
                                                       Entry entry, Taken& taken) {
  std::vector<Choice> choices;
  try {
    for (const Wanted& want : wanted) {
      const std::uint64_t slot_nbytes = round_to_pages(want.nbytes);
      std::vector<Slot>& ready = taken[slot_nbytes];
      if (!ready.empty()) {
        choices.push_back({ready.back(), nullptr});
        ready.pop_back();
      } else if (const auto slot = arena_.take(slot_nbytes)) {
        choices.push_back({*slot, nullptr});
      } else {
        choices.push_back({0, choose_victim(want, entry == Entry::guessed)});
      }
      policy_.insert(want.key, slot_nbytes, entry);
    }
  } catch (...) {
    for (const auto& [nbytes, slots] : taken)
      for (Slot slot : slots) arena_.give(slot);
    for (std::size_t i = 0; i < choices.size(); ++i) {
      policy_.erase(wanted[i].key);
      if (const Block* victim = choices[i].victim)
        policy_.insert(victim->key, victim->slot_nbytes,
                       victim->guessed ? Entry::guessed : Entry::demanded);
      else
        arena_.give(choices[i].slot);
    }
    throw;
  }
  return choices;
}

// Takes the slots that can't come from evicting blocks of their own size class, or none at all.
bool Residency::take_short(Arena& arena, const IdleCounts& idle, const Need& need,
                           bool spare_protected, Taken& taken) const {
  // Alone, a class may cut whole slabs; beside others it leaves them what it doesn't need.
  for (const auto& [slot_nbytes, num_slots] : need) {
    const auto found = idle.find(slot_nbytes);
    const IdleCount count = found == idle.end() ? IdleCount{} : found->second;
    const std::uint64_t evictable = count.all - (spare_protected ? count.protected_ : 0);
    std::vector<Slot>& slots = taken[slot_nbytes];
    while (slots.size() + evictable < num_slots) {
      const std::uint64_t missing = num_slots - evictable - slots.size();
      const auto slot = arena.take(slot_nbytes, need.size() > 1 ? missing : kMaxSlotsPerSlab);
      if (slot) {
        slots.push_back(*slot);
        continue;
      }
      for (const auto& [nbytes, given] : taken)
        for (Slot back : given) arena.give(back);
      return false;
    }
  }
  return true;
}

// Protected blocks go last: first among the others, then, for demand alone, among all.
Block* Residency::choose_victim(const Wanted& want, bool spare_protected) {
  const std::uint64_t slot_nbytes = round_to_pages(want.nbytes);
  const auto choose = [&](bool spare) {
    const auto admits = [&](Key key) {
      const Block* block = find(key);  // null: this admission has just told the policy of it
      return block != nullptr && block->slot_nbytes == slot_nbytes && evictable(*block) &&
             !(spare && block->protected_);
    };
    // Of a guess the policy hears only when it is used.
    return policy_.evict(admits, spare_protected ? kNoKey : want.key);
  };
  auto key = choose(true);
  if (!key && !spare_protected) key = choose(false);
  // `admit` has counted the evictable blocks, so a policy that finds none has lost one.
  if (!key) throw std::logic_error("the eviction policy returned no victim though there is one");
  return find(*key);
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
  arena_.give(block.slot);
  blocks_.erase(block.key);
}

// Other size classes hold the arena, or it is in pieces: empty whole slabs, of classes that aren't
// needed first, least used first.
bool Residency::make_room(const Need& need, std::vector<Victim>& victims) {
  const auto uses = survey();
  std::vector<Arena::Slab> idle;
  for (const auto& [offset, slab] : arena_.slabs())
    if (uses.at(offset).idle) idle.push_back(slab);
  std::stable_sort(idle.begin(), idle.end(), [&](const Arena::Slab& a, const Arena::Slab& b) {
    const bool a_needed = need.count(a.slot_nbytes), b_needed = need.count(b.slot_nbytes);
    if (a_needed != b_needed) return b_needed;
    return a.num_used * a.slot_nbytes < b.num_used * b.slot_nbytes;
  });

  // Rehearse on a copy of the accounts: nothing may change if it isn't enough.
  Arena rehearsal = arena_;
  IdleCounts counts = idle_;
  std::size_t num_emptied = 0;
  for (bool enough = false; !enough;) {
    if (num_emptied == idle.size()) return false;
    const Arena::Slab& slab = idle[num_emptied++];
    for (Key key : uses.at(slab.offset).keys) {
      const Block& block = **blocks_.find(key);
      rehearsal.give(block.slot);
      --counts[slab.slot_nbytes].all;
    }
    rehearsal.release_slab(slab.offset);
    Arena trial = rehearsal;
    Taken taken;
    enough = take_short(trial, counts, need, false, taken);
  }
  for (std::size_t i = 0; i < num_emptied; ++i)
    empty_slab(idle[i].offset, uses.at(idle[i].offset), victims);
  return true;
}

// --- slots of several sizes ---
//
// A victim's slot fits blocks of its own size alone, so a size would keep the slabs that it got
// first, whatever the policy thinks of its blocks. Memory is where it is worth most when victims of
// all sizes were unused for equally long: a slab passes from the size with the oldest victims to
// the one that has to evict younger ones. Source: memcached's slab automover by age.

void Residency::note_victim(const Block& block) {
  Pressure& pressure = pressure_[block.slot_nbytes];
  const auto age = static_cast<double>(clock_ - block.last_use);
  pressure.age += (age - pressure.age) / std::min<double>(++pressure.num_victims, kAgeWindow);
}

// Brings a slab to this size if its victims are much younger than another's.
void Residency::balance(std::uint64_t slot_nbytes, std::vector<Victim>& victims) {
  const bool alone = idle_.size() < 2 && pressure_.size() < 2;
  if (alone) return;
  Pressure& mine = pressure_[slot_nbytes];
  const std::uint64_t wait =
      std::max<std::uint64_t>(kAgeWindow, 2 * arena_.budget() / kSlabsPerArena / slot_nbytes);
  if (mine.num_victims < wait) return;
  mine.num_victims = kAgeWindow / 2;
  std::uint64_t donor = 0;
  double oldest = kMuchOlder * mine.age;
  for (const auto& [size, age] : idle_ages()) {
    const auto known = pressure_.find(size);
    const double victims_age = known == pressure_.end() ? age : std::max(age, known->second.age);
    if (size == slot_nbytes || victims_age <= oldest) continue;
    donor = size;
    oldest = victims_age;
  }
  if (donor == 0) return;
  const auto uses = survey();
  const SlabUse* chosen = nullptr;
  std::uint64_t chosen_offset = 0;
  double chosen_age = -1;
  for (const auto& [offset, use] : uses) {
    if (!use.idle || arena_.slabs().at(offset).slot_nbytes != donor) continue;
    double age = 0;
    for (Key key : use.keys) age += static_cast<double>(clock_ - (*blocks_.find(key))->last_use);
    age /= static_cast<double>(std::max<std::size_t>(use.keys.size(), 1));
    if (age <= chosen_age) continue;
    chosen = &use;
    chosen_offset = offset;
    chosen_age = age;
  }
  if (chosen != nullptr) empty_slab(chosen_offset, *chosen, victims);
}

// How long ago the longest unused block of each slot size was used.
std::map<std::uint64_t, double> Residency::idle_ages() const {
  std::map<std::uint64_t, double> ages;
  blocks_.each([&](Key, const std::unique_ptr<Block>& block) {
    if (!evictable(*block)) return;
    double& age = ages[block->slot_nbytes];
    age = std::max(age, static_cast<double>(clock_ - block->last_use));
  });
  return ages;
}

// Which blocks lie in which slab, and whether the slab could be emptied now.
std::map<std::uint64_t, Residency::SlabUse> Residency::survey() const {
  std::map<std::uint64_t, SlabUse> uses;
  for (const auto& [offset, slab] : arena_.slabs()) uses[offset];
  for (Slot slot : held_) uses[arena_.slab_of(slot).offset].idle = false;
  blocks_.each([&](Key key, const std::unique_ptr<Block>& block) {
    SlabUse& use = uses[arena_.slab_of(block->slot).offset];
    use.idle &= evictable(*block);
    use.keys.push_back(key);
  });
  return uses;
}

void Residency::empty_slab(std::uint64_t offset, const SlabUse& use, std::vector<Victim>& victims) {
  for (Key key : use.keys) {
    policy_.erase(key);
    victims.push_back(remove(*find(key), false));
  }
  arena_.release_slab(offset);
}

bool Residency::resize(std::uint64_t budget, std::vector<Arena::Slab>& released) {
  arena_.set_budget(budget);
  policy_.policy().set_budget(budget);
  if (arena_.nbytes_cut() <= budget) return true;
  std::vector<Victim> victims;
  const auto uses = survey();
  // From the top, so that what stays is contiguous.
  for (auto use = uses.rbegin(); use != uses.rend() && arena_.nbytes_cut() > budget; ++use) {
    if (!use->second.idle) continue;
    released.push_back(arena_.slabs().at(use->first));
    empty_slab(use->first, use->second, victims);
  }
  // Slabs with pins in them stay for now; the other blocks in them needn't.
  while (arena_.nbytes_used() > budget) {
    const auto admits = [&](Key key) { return evictable(*find(key)); };
    const auto key = policy_.evict(admits, kNoKey);
    if (!key) break;
    victims.push_back(remove(*find(*key), false));
  }
  return arena_.nbytes_cut() <= budget;
}

std::uint64_t Residency::nbytes_idle() const {
  std::uint64_t nbytes = 0;
  for (const auto& [slot_nbytes, count] : idle_) nbytes += slot_nbytes * count.all;
  return nbytes;
}

bool Residency::quiet() const {
  std::uint64_t num_idle = 0;
  for (const auto& [slot_nbytes, count] : idle_) num_idle += count.all;
  return num_idle == blocks_.size() && held_.empty();
}

void Residency::use(Block& block) {
  block.last_use = ++clock_;
  policy_.touch(block.key);
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
  policy_.erase(block.key);
  policy_.insert(block.key, block.slot_nbytes, Entry::guessed);
}

void Residency::drop(Block& block) {
  policy_.erase(block.key);
  forget(block);
}

}  // namespace tiered_mem
