// The transfers of Tiers: into HBM, and back to DRAM, from their start to the accounts.
#include "error.h"
#include "tiers.h"

namespace tiered_mem {

Tiers::Ticket Tiers::start_load(Block& block, Priority priority, std::uint32_t rank) {
  const Key key = block.key;
  auto transfer = std::make_shared<Transfer>();
  transfer->target = hbm(block.slot);
  transfer->keep_alive = {hbm_memory_, dram_memory_};
  transfer->due = clock_;
  transfer->probability = -static_cast<double>(rank);
  if (const auto leaving = leaving_.find(block.slot); leaving != leaving_.end())
    transfer->after.push_back(leaving->second);
  transfer->after_marks = last_uses_.of(block.slot, block.slot_nbytes);
  Block* copy = has_dram_ ? dram_.find(key) : nullptr;
  transfer->from_store = copy == nullptr || copy->state == State::failed;
  if (copy == nullptr && has_dram_ && !copy_back_) {
    start_feeding(key, priority, rank);
    copy = dram_.find(key);
  }
  if (copy != nullptr && copy->state != State::failed) {
    transfer->link = Link::dram_to_hbm;
    transfer->nbytes = copy->slot_nbytes;
    transfer->source = dram(copy->slot);
    dram_.pin(*copy);
    // What HBM has is the first that DRAM can do without. Said now rather than when it arrives, so
    // that the order of arrivals decides nothing.
    if (copy_back_) dram_.demote_rank(*copy);
    if (const auto arriving = demotions_.find(key); arriving != demotions_.end())
      transfer->fed_by = arriving->second;
  } else {
    transfer->link = Link::nvme_to_hbm;
    transfer->extent = source_of(key);
    transfer->nbytes = transfer->extent->nbytes;
  }
  transfer->on_end = [this, key](Transfer& ended) { on_end({key, 0, ended.shared_from_this()}); };
  loads_[key] = transfer;
  submit(transfer, priority, key);
  return transfer;
}

// An I/O thread only says that a transfer has ended. What follows asks policies, which is for the
// threads that call.
void Tiers::on_end(Ended ended) {
  {
    Lock lock(mutex_);
    ended_.push_back(std::move(ended));
  }
  changed_.notify_all();
}

void Tiers::settle_ended() {
  release_orphans();
  if (ended_.empty()) return;
  std::vector<Ended> all;
  all.swap(ended_);
  for (const Ended& ended : all) {
    if (ended.ticket->into_dram)
      settle_demotion(ended);
    else
      settle_load(ended.key, *ended.ticket);
  }
  finish_resize();
}

// Does the accounts of an ended load, once: an event that finds it ended may come first.
void Tiers::settle_load(Key key, const Transfer& transfer) {
  const auto found = loads_.find(key);
  if (found == loads_.end() || found->second.get() != &transfer) return;
  const Ticket keep = found->second;
  loads_.erase(found);
  if (transfer.link == Link::dram_to_hbm) {
    dram_.unpin(*dram_.find(key));
  }
  Block& block = *hbm_.find(key);
  switch (transfer.status()) {
    case Transfer::Status::done:
      hbm_.mark_ready(block);
      break;
    case Transfer::Status::failed:
      ++stats_.num_failed;
      hbm_.mark_failed(block);
      break;
    default:
      stats_.nbytes_prefetch_wasted += transfer.nbytes_moved();
      // Only guesses are cancelled, but by close(): then the events keep their slots.
      if (block.pins > 0)
        hbm_.mark_failed(block);
      else
        hbm_.drop(block);
  }
}

// What leaves HBM is copied to DRAM, unless it still lies there: then it is fresh again. Guesses
// that nobody used and blocks of emptied slabs aren't worth, or can't have, a copy.
void Tiers::handle_victims(const std::vector<Victim>& victims, Priority priority) {
  for (const Victim& victim : victims) {
    log(Happening::evict, victim.key);
    if (victim.unused_guess) stats_.nbytes_prefetch_wasted += victim.nbytes;
    if (!has_dram_) continue;
    if (Block* copy = dram_.find(victim.key))
      dram_.use(*copy);
    else if (copy_back_ && victim.slot_reused && !victim.unused_guess)
      start_demotion(victim, priority);
  }
}

// nullptr if DRAM has no room now.
Block* Tiers::admit_to_dram(Key key, std::uint64_t nbytes) {
  std::vector<Victim> dropped;
  try {
    if (dram_.admit({{key, nbytes}}, Entry::demanded, dropped) != Admission::ok) return nullptr;
  } catch (const PolicyError&) {  // the block's place in HBM is settled: it does without the copy
    policy_error_ = std::current_exception();
    return nullptr;
  }
  return dram_.find(key);
}

// Reads a block into DRAM, if there is room now.
void Tiers::start_feeding(Key key, Priority priority, std::uint32_t rank) {
  auto transfer = std::make_shared<Transfer>();
  transfer->extent = source_of(key);
  transfer->nbytes = transfer->extent->nbytes;
  const Block* copy = admit_to_dram(key, round_to_pages(transfer->nbytes));
  if (copy == nullptr) return;
  transfer->link = Link::nvme_to_hbm;
  transfer->into_dram = true;
  transfer->due = clock_;
  transfer->probability = -static_cast<double>(rank);
  transfer->target = dram(copy->slot);
  transfer->keep_alive = {dram_memory_};
  transfer->on_end = [this, key](Transfer& ended) { on_end({key, 0, ended.shared_from_this()}); };
  demotions_[key] = transfer;
  submit(transfer, priority, key);
}

// Does nothing if DRAM has no room now.
void Tiers::start_demotion(const Victim& victim, Priority priority) {
  const Block* copy = admit_to_dram(victim.key, victim.nbytes);
  if (copy == nullptr) return;
  auto transfer = std::make_shared<Transfer>();
  transfer->link = Link::hbm_to_dram;
  transfer->into_dram = true;
  transfer->due = clock_;
  transfer->nbytes = victim.nbytes;
  transfer->source = hbm(victim.slot);
  transfer->target = dram(copy->slot);
  transfer->keep_alive = {hbm_memory_, dram_memory_};
  transfer->on_end = [this, key = victim.key, slot = victim.slot](Transfer& ended) {
    on_end({key, slot, ended.shared_from_this()});
  };
  hbm_.hold(victim.slot);
  demotions_[victim.key] = transfer;
  leaving_[victim.slot] = transfer;
  submit(transfer, priority, victim.key);
}

void Tiers::submit(const Ticket& transfer, Priority priority, Key key) {
  if (engine_.submit(transfer, priority)) return;
  if (!engine_.device_error()) throw RuntimeClosed("the runtime is closed");
  ended_.push_back({key, 0, transfer});  // failed, and settled as such
}

void Tiers::settle_demotion(const Ended& ended) {
  demotions_.erase(ended.key);
  // The slot's next owner may have come and be leaving by now.
  if (const auto found = leaving_.find(ended.hbm_slot);
      found != leaving_.end() && found->second == ended.ticket) {
    leaving_.erase(found);
    hbm_.unhold(ended.hbm_slot);
  }
  Block& block = *dram_.find(ended.key);
  if (ended.ticket->status() == Transfer::Status::done)
    dram_.mark_ready(block);
  else
    dram_.mark_failed(block);
}

}  // namespace tiered_mem
