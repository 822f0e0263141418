// Hints of Tiers: which become transfers, and what becomes of them.
#include <algorithm>

#include "error.h"
#include "tiers.h"

namespace tiered_mem {

void Tiers::hint(const Key* keys, std::size_t num_keys, std::uint64_t stream, bool exact) {
  if (num_keys == 0) return;
  const Lock held = lock();
  check_open();
  const Partition partition = partition_of(keys[0]);
  for (std::size_t i = 0; i < num_keys; ++i) {
    if (partition_of(keys[i]) != partition)
      throw ConfigError("the keys of a hint are of one layer");
    source_of(keys[i]);
  }
  for (const Hint& stale : hints_.take(stream, partition)) drop_hint(stale);
  std::vector<Hint> hints;
  for (std::uint32_t rank = 0; rank < num_keys; ++rank)
    hints.push_back({keys[rank], rank, hbm_.find(keys[rank]) == nullptr});
  stats_.num_hints += num_keys;
  ++clock_;  // several layers may be hinted before the first one's event: what is due first, first

  // What is predicted and present stays, at least as far as other guesses are concerned.
  for (const Hint& hint : hints)
    if (!hint.missing) hbm_.protect(*hbm_.find(hint.key), true);

  for (const Hint& hint : hints)
    hbm_.policy().hint(hint.key, exact ? 1.0 : hints_.likelihood(partition, hint.rank));
  const std::vector<Hint> ranked = hints;
  for (const Hint& forgotten : hints_.open(stream, partition, std::move(hints)))
    drop_hint(forgotten);

  for (const Hint& hint : ranked) {
    if (!queue_.empty()) break;  // an event waits for the room that guesses would take
    if (!hint.missing || !(exact || hints_.pays(partition, hint.rank))) continue;
    if (hbm_.find(hint.key) != nullptr) continue;  // named twice
    const std::uint64_t nbytes = round_to_pages(source_of(hint.key)->nbytes);
    if (hbm_.nbytes_guessed() + nbytes > std::max(max_guessed_nbytes_, nbytes)) break;
    std::vector<Victim> victims;
    if (hbm_.admit({{hint.key, nbytes}}, Entry::guessed, victims) != Admission::ok) break;
    handle_victims(victims, Priority::prefetch);
    Block& block = *hbm_.find(hint.key);
    hbm_.protect(block, true);
    start_load(block, Priority::prefetch, hint.rank);
    log(Happening::prefetch, hint.key);
    ++stats_.num_prefetched;
  }
  engine_.pump();
}

// The router has spoken: wrong hints are cancelled. Right ones become demands in `try_acquire`.
void Tiers::settle_hints(const Key* keys, std::size_t num_keys, std::uint64_t stream) {
  if (num_keys == 0) return;
  const Partition partition = partition_of(keys[0]);
  for (const Hint& hint : hints_.take(stream, partition)) {
    const bool right = std::find(keys, keys + num_keys, hint.key) != keys + num_keys;
    hints_.judge(partition, hint, right);
    if (right)
      hbm_.policy().hint(hint.key, 0);
    else
      drop_hint(hint);
  }
}

void Tiers::drop_hint(const Hint& hint) {
  hbm_.policy().hint(hint.key, 0);
  Block* block = hbm_.find(hint.key);
  if (block == nullptr) return;
  hbm_.protect(*block, false);
  if (block->guessed && block->state == State::loading) cancel_load(hint.key);
}

std::map<Partition, HintBook::Precision> Tiers::precision() {
  const Lock held = lock();
  return hints_.precision();
}

std::vector<bool> Tiers::announce(const Key* keys, std::size_t num_keys, std::uint64_t stream) {
  const Lock held = lock();
  check_open();
  settle_hints(keys, num_keys, stream);
  begin_event({keys, keys + num_keys});  // once for all of its waves
  announced_[stream] = num_keys;
  std::vector<bool> present(num_keys);
  for (std::size_t i = 0; i < num_keys; ++i) {
    const Block* block = hbm_.find(keys[i]);
    present[i] = block != nullptr && block->state != State::failed;
  }
  return present;
}

}  // namespace tiered_mem
