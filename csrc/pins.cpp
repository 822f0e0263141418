// How events of Tiers end: pins, slots that computing may still read, and repairs left undone.
#include <iterator>
#include <utility>

#include "error.h"
#include "tiers.h"

namespace tiered_mem {

void Tiers::release(Event& event, Compute compute) {
  if (forked()) return;
  std::vector<Leaving> leaving;
  {
    refuse_in_policy();
    Lock lock(mutex_);
    if (event.released_) return;
    event.released_ = true;
    settle_ended();
    unpin_all({event.keys_, event.slots_, event.stream_, compute, &event});
    finish_resize();
    leaving = take_idle_segments();
  }
  changed_.notify_all();
  let_go(std::move(leaving));
}

void Tiers::unpin_all(const Orphan& holds) {
  abandon_repairs(holds.event);
  guard_slots(holds.keys, holds.compute);
  for (Key key : holds.keys) hbm_.unpin(*hbm_.find(key));
  const auto holder = holders_.find(holds.stream);
  if (--holder->second == 0) holders_.erase(holder);
}

// Takes no lock that could be held while Python runs.
void Tiers::orphan(Event& event) {
  if (event.released_ || forked()) return;
  event.released_ = true;
  if (closed_) await_compute(event.compute_);  // the event may be the last to hold the memory
  {
    const std::lock_guard lock(orphans_mutex_);
    orphans_.push_back(
        {std::move(event.keys_), std::move(event.slots_), event.stream_, event.compute_, &event});
    has_orphans_ = true;
  }
  changed_.notify_all();
}

void Tiers::release_orphans() {
  if (!has_orphans_) return;
  std::vector<Orphan> all;
  {
    const std::lock_guard lock(orphans_mutex_);
    all.swap(orphans_);
    has_orphans_ = false;
  }
  for (const Orphan& orphan : all) unpin_all(orphan);
  finish_resize();
}

// Two events may share a block that failed, and only one of them at a time may fill it. A stream's
// own events take turns by themselves.
bool Tiers::others_repair(const Event& event, Key key) const {
  const auto found = repairs_.find(key);
  return found != repairs_.end() && found->second.stream != event.stream_;
}

void Tiers::abandon_repairs(const Event* event) {
  bool any = false;
  for (auto it = repairs_.begin(); it != repairs_.end();) {
    const bool own = it->second.event == event;
    any |= own;
    it = own ? repairs_.erase(it) : std::next(it);
  }
  if (any) changed_.notify_all();
}

// Slots of blocks, pinned yet, that what was given to `compute` may read.
void Tiers::guard_slots(const std::vector<Key>& keys, Compute compute) {
  // I/O threads know no marks: where they write into the device's memory, computing ends first.
  if (closed_ || !device_->asynchronous()) return await_compute(compute);
  try {
    const auto reached = [&](const MarkPtr& mark) { return device_->reached(mark); };
    if (const MarkPtr mark = device_->mark_compute(compute))
      for (Key key : keys) {
        const Block& block = *hbm_.find(key);
        last_uses_.add(block.slot, block.slot_nbytes, compute, mark, reached);
      }
  } catch (const Error&) {  // whoever releases may not fail
    engine_.fail_device(std::current_exception());
  }
}

void Tiers::await_compute(Compute compute) noexcept {
  if (engine_.is_virtual() || !(device_->asynchronous() || device_->stream_ordered())) return;
  try {
    device_->wait(device_->mark_compute(compute));
  } catch (const Error&) {  // the device failed: nothing is computed any more
  }
}

}  // namespace tiered_mem
