// Events: admission, pins, and waiting for their blocks.
#include <algorithm>
#include <chrono>
#include <iterator>
#include <string>
#include <utility>

#include "error.h"
#include "tiers.h"

namespace tiered_mem {

namespace {

// How long a waiting thread goes without looking whether it was interrupted.
constexpr std::chrono::milliseconds kPollEvery{100};

void check_distinct(const std::vector<Key>& keys) {
  std::vector<Key> sorted = keys;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
    throw ConfigError("the keys of an event are distinct; this one names a block twice");
}

}  // namespace

std::shared_ptr<Event> Tiers::acquire(const Key* keys, std::size_t num_keys, std::uint64_t stream,
                                      bool wait) {
  auto event = std::make_shared<Event>(shared_from_this(), keys, num_keys, stream);
  check_distinct(event->keys_);
  Lock held = lock();
  check_open();
  for (std::size_t i = 0; i < num_keys; ++i) source_of(keys[i]);
  settle_hints(event->keys_.data(), event->keys_.size(), event->stream_);
  const auto announced = announced_.find(stream);
  if (announced == announced_.end()) begin_event(event->keys_);
  const bool goes_ahead = queue_.empty() || holders_.count(stream) > 0;
  if (!goes_ahead || try_acquire(*event) != Admission::ok) {
    if (!wait) return nullptr;
    wait_for_room(held, *event);
  }
  if (const auto left = announced_.find(stream); left != announced_.end()) {
    if (left->second <= num_keys)
      announced_.erase(left);
    else
      left->second -= num_keys;
  }
  ++clock_;
  ++stats_.num_events;
  hold_event(*event);
  return event;
}

// The event has its pins.
void Tiers::hold_event(Event& event) {
  event.released_ = false;
  event.memory_ = hbm_memory_;
  ++holders_[event.stream_];
  engine_.pump();
  changed_.notify_all();  // others may wait for what this has raised or started
  rethrow_policy_errors();
}

std::shared_ptr<Event> Tiers::create(const Key* keys, std::size_t num_keys, std::uint64_t stream,
                                     Compute compute) {
  auto event = std::make_shared<Event>(shared_from_this(), keys, num_keys, stream);
  event->creates_ = true;
  event->compute_ = compute;
  check_distinct(event->keys_);
  Lock held = lock();
  check_open();
  for (Key key : event->keys_) {
    source_of(key);
    if (hbm_.find(key) != nullptr)
      throw ConfigError("block " + std::to_string(key) + " is in HBM already: remove it first");
  }
  begin_event(event->keys_);
  const bool goes_ahead = queue_.empty() || holders_.count(stream) > 0;
  if (!goes_ahead || try_acquire(*event) != Admission::ok) wait_for_room(held, *event);
  hold_event(*event);
  // Who fills a slot comes after what is still being copied out of it.
  Clock::time_point next_poll{};
  for (Slot slot : event->slots_)
    while (still_leaves(slot)) wait_changed(held, next_poll);
  for (Key key : event->keys_) hold_for_repair(*hbm_.find(key), compute);
  return event;
}

bool Tiers::still_leaves(Slot slot) const {
  const auto leaving = leaving_.find(slot);
  if (leaving == leaving_.end() || leaving->second->ended()) return false;
  return !(device_->stream_ordered() && leaving->second->issued());
}

std::shared_ptr<Event> Tiers::acquire_resident(const Key* keys, std::size_t num_keys,
                                               std::uint64_t stream) {
  const Lock held = lock();
  check_open();
  auto event = std::make_shared<Event>(shared_from_this(), keys, num_keys, stream);
  for (std::size_t i = 0; i < num_keys; ++i) {
    const Block* block = hbm_.find(keys[i]);
    if (block == nullptr || block->state != State::ready) return nullptr;
    event->slots_.push_back(block->slot);
    event->ready_.push_back(static_cast<std::uint32_t>(i));
  }
  for (std::size_t i = 0; i < num_keys; ++i) hbm_.pin(*hbm_.find(keys[i]));
  event->tickets_.resize(num_keys);
  event->released_ = false;
  event->memory_ = hbm_memory_;
  ++holders_[stream];
  return event;
}

void Tiers::note_uses(const Key* keys, std::size_t num_keys) {
  const std::vector<Key> used(keys, keys + num_keys);
  const Lock held = lock();
  check_open();
  for (Key key : used) source_of(key);
  begin_event(used);
  ++stats_.num_events;
  if (num_keys > 0) log(Happening::event, used[0]);
  for (Key key : used) {
    ++stats_.num_hbm_hits;
    stats_.nbytes_hit += source_of(key)->nbytes;
    log(Happening::hit, key);
    if (Block* block = hbm_.find(key)) hbm_.use(*block);  // it may have left since
  }
  rethrow_policy_errors();
}

void Tiers::begin_event(const std::vector<Key>& keys) {
  if (keys.empty()) return;
  hbm_.policy().begin_event(partition_of(keys[0]));
  if (has_dram_) dram_.policy().begin_event(partition_of(keys[0]));
}

// Once all is in its place: the event that the error belongs to is then released.
void Tiers::rethrow_policy_errors() {
  std::exception_ptr error = std::exchange(policy_error_, nullptr);
  for (Residency* residency : {&hbm_, &dram_}) {
    try {
      residency->policy().rethrow();
    } catch (const PolicyError&) {  // the others' must not wait for an event that has no part in it
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Returns once the event is admitted.
void Tiers::wait_for_room(Lock& lock, Event& event) {
  struct Place {  // in the queue, given up however this ends
    Tiers& tiers;
    const Event* event;
    ~Place() {
      auto& queue = tiers.queue_;
      queue.erase(std::find(queue.begin(), queue.end(), event));
      tiers.changed_.notify_all();
    }
  };
  queue_.push_back(&event);
  const Place place{*this, &event};
  const double started = engine_.now();
  for (Clock::time_point next_poll{};;) {
    check_open();
    if (queue_.front() == &event || holders_.count(event.stream_) > 0) {
      if (try_acquire(event) == Admission::ok) {
        count_stall(started);
        return;
      }
      if (cancel_guesses(event)) continue;
    }
    wait_changed(lock, next_poll);
  }
}

// Demand needs the slots of guesses that are still on their way. True if that freed some at once.
bool Tiers::cancel_guesses(const Event& event) {
  std::vector<Key> guesses;
  for (const auto& [key, ticket] : loads_) {
    const Block& block = *hbm_.find(key);
    const auto& own = event.keys_;
    if (block.guessed && std::find(own.begin(), own.end(), key) == own.end())
      guesses.push_back(key);
  }
  bool any = false;
  for (Key key : guesses) any |= cancel_load(key);
  return any;
}

void Tiers::count_stall(double since) {
  stats_.stall_ns += static_cast<std::uint64_t>((engine_.now() - since) * 1e9 + 0.5);
}

// True if the load ended by it and its slot is free again.
bool Tiers::cancel_load(Key key) {
  const Ticket ticket = loads_.at(key);
  if (!engine_.cancel(ticket)) return false;
  settle_load(key, *ticket);
  return true;
}

// `ok` or `busy`. Throws EventTooLarge.
Admission Tiers::try_acquire(Event& event) {
  const std::size_t num_keys = event.keys_.size();
  std::vector<Wanted> wanted;
  std::vector<Block*> present(num_keys, nullptr);
  std::uint64_t nbytes = 0;
  for (std::size_t i = 0; i < num_keys; ++i) {
    present[i] = find_usable(event.keys_[i]);
    if (present[i] == nullptr)
      wanted.push_back({event.keys_[i], source_of(event.keys_[i])->nbytes});
    nbytes += present[i] ? present[i]->slot_nbytes : round_to_pages(wanted.back().nbytes);
  }
  const Arena& arena = hbm_.arena();
  const std::uint64_t largest = num_keys ? nbytes / num_keys : 0;  // blocks of a layer are alike
  if (nbytes > arena.budget() || (num_keys > 0 && num_keys > arena.max_slots(largest)))
    throw EventTooLarge("an event of " + std::to_string(num_keys) + " blocks, " +
                        std::to_string(nbytes) + " bytes, doesn't fit the HBM budget of " +
                        std::to_string(std::min(arena.budget(), arena.reserved())) +
                        " bytes; raise hbm or split the event into waves");
  for (const Block* block : present)
    if (block != nullptr && !can_join(*block)) return Admission::busy;

  // Pins first, so that making room for the missing keys can't evict the present ones.
  std::vector<Victim> victims;
  for (Block* block : present)
    if (block != nullptr) hbm_.pin(*block);
  const auto unpin = [&] {
    for (Block* block : present)
      if (block != nullptr) hbm_.unpin(*block);
  };
  Admission admission;
  try {
    admission = hbm_.admit(wanted, Entry::demanded, victims);
  } catch (...) {
    unpin();
    throw;
  }
  if (admission != Admission::ok) {
    unpin();
    if (wanted.size() == num_keys || !hbm_.quiet()) return Admission::busy;
    // Only the event's own blocks are in the way, in pieces of the arena: start over without them.
    for (Block* block : present)
      if (block != nullptr) hbm_.drop(*block);
    return try_acquire(event);
  }

  // What leaves HBM must not push out of DRAM what is about to be read there.
  std::vector<Block*> copies;
  for (const Wanted& block : wanted)
    if (Block* copy = dram_.find(block.key)) copies.push_back(copy);
  for (Block* copy : copies) dram_.pin(*copy);
  if (!event.creates_) log(Happening::event, num_keys ? event.keys_[0] : kNoKey);
  handle_victims(victims, Priority::demand);

  event.slots_.resize(num_keys);
  event.tickets_.resize(num_keys);
  for (std::size_t i = 0; i < num_keys; ++i) {
    if (present[i] != nullptr)
      join(event, i, *present[i]);
    else if (event.creates_)
      await_bytes(event, i, *hbm_.find(event.keys_[i]));
    else
      load(event, i, *hbm_.find(event.keys_[i]));
  }
  event.num_pending_ = event.creates_ ? 0 : num_keys - event.ready_.size();
  for (Block* copy : copies) dram_.unpin(*copy);
  return Admission::ok;
}

// A load that ended without its bytes, not yet in the accounts, makes its block absent.
Block* Tiers::find_usable(Key key) {
  Block* block = hbm_.find(key);
  if (block == nullptr || block->state != State::loading) return block;
  const Ticket ticket = loads_.at(key);
  if (!ticket->ended() || ticket->status() == Transfer::Status::done) return block;
  settle_load(key, *ticket);
  return hbm_.find(key);
}

// Another event's failed block can't be joined: it goes with that event.
bool Tiers::can_join(const Block& block) {
  if (block.state != State::loading) return block.state == State::ready;
  const Ticket ticket = loads_.at(block.key);
  return engine_.raise(ticket) || ticket->status() == Transfer::Status::done;
}

void Tiers::join(Event& event, std::size_t position, Block& block) {
  if (block.guessed) {
    ++stats_.num_prefetched_used;
    stats_.nbytes_prefetch_used += block.slot_nbytes;
  }
  hbm_.use(block);
  event.slots_[position] = block.slot;
  if (block.state == State::ready) {
    ++stats_.num_hbm_hits;
    stats_.nbytes_hit += source_of(block.key)->nbytes;
    log(Happening::hit, block.key);
    event.ready_.push_back(static_cast<std::uint32_t>(position));
  } else {
    ++stats_.num_in_flight;
    log(Happening::in_flight, block.key);
    event.tickets_[position] = loads_.at(block.key);
  }
}

void Tiers::load(Event& event, std::size_t position, Block& block) {
  hbm_.pin(block);
  event.slots_[position] = block.slot;
  event.tickets_[position] = start_load(block, Priority::demand, 0);
  const bool from_dram = !event.tickets_[position]->from_store;
  log(from_dram ? Happening::dram_hit : Happening::nvme_read, block.key);
  if (from_dram) {
    ++stats_.num_dram_hits;
    return;
  }
  ++stats_.num_nvme_reads;
  stats_.nbytes_missed += event.tickets_[position]->nbytes;
}

// Until its bytes are there it is what a failed block is: nobody else's to use.
void Tiers::await_bytes(Event& event, std::size_t position, Block& block) {
  hbm_.pin(block);
  hbm_.mark_failed(block);
  event.slots_[position] = block.slot;
  repairs_[block.key] = {&event, event.stream_};
}

// A waiting thread looks now and then whether it was interrupted, other threads' traffic or not.
void Tiers::wait_changed(Lock& lock, Clock::time_point& next_poll) {
  if (engine_.is_virtual()) {
    lock.unlock();
    const bool stepped = engine_.step();
    lock.lock();
    if (!stepped) throw ConfigError("this waits for something that isn't under way");
    settle_ended();
    return;
  }
  if (next_poll == Clock::time_point{}) next_poll = Clock::now() + kPollEvery;
  changed_.wait_until(lock, next_poll);
  settle_ended();
  if (Clock::now() < next_poll) return;
  struct Unlocked {
    Lock& lock;
    explicit Unlocked(Lock& lock) : lock(lock) { lock.unlock(); }
    ~Unlocked() { lock.lock(); }
  };
  {
    const Unlocked unlocked(lock);
    poll_();
  }
  settle_ended();
  next_poll = Clock::now() + kPollEvery;
}

Event::Event(std::shared_ptr<Tiers> tiers, const Key* keys, std::size_t num_keys,
             std::uint64_t stream)
    : tiers_(std::move(tiers)), keys_(keys, keys + num_keys), stream_(stream) {}

Event::~Event() { tiers_->orphan(*this); }

void Event::release(Compute compute) { tiers_->release(*this, compute); }

void Event::check_held() const {
  if (released_) throw ConfigError("the event was released: its slots may hold other blocks");
}

std::vector<std::uint32_t> Event::wait_any(std::vector<Failure>& failures, Compute compute) {
  Tiers::Lock lock = tiers_->lock();
  check_held();
  compute_ = compute;
  tiers_->abandon_repairs(this);
  std::vector<std::uint32_t> positions;
  positions.swap(ready_);
  if (num_pending_ == 0) return positions;
  const double started = tiers_->engine_.now();
  bool waited = false;
  MarkPtr held;  // the last that compute waits for
  for (Tiers::Clock::time_point next_poll{};;) {
    for (std::uint32_t i = 0; i < tickets_.size(); ++i) {
      const auto ticket = tickets_[i];
      if (!ticket) continue;
      if (!ticket->ended()) {
        if (!tiers_->hold_for(*ticket, compute, held)) continue;
        positions.push_back(i);
        tickets_[i] = nullptr;
        --num_pending_;
        continue;
      }
      tiers_->settle_load(keys_[i], *ticket);
      if (ticket->status() == Transfer::Status::cancelled) tiers_->check_open();
      if (tiers_->hbm_.find(keys_[i])->state == State::ready) {  // or repaired by another event
        positions.push_back(i);
      } else {
        if (tiers_->others_repair(*this, keys_[i])) continue;
        tiers_->repairs_[keys_[i]] = {this, stream_};
        failures.push_back({i, ticket->error()});
        tiers_->hold_for_repair(*tiers_->hbm_.find(keys_[i]), compute);
      }
      tickets_[i] = nullptr;
      --num_pending_;
    }
    if (!positions.empty() || !failures.empty() || num_pending_ == 0) break;
    tiers_->check_open();
    waited = true;
    tiers_->wait_changed(lock, next_poll);
    check_held();
  }
  if (waited) tiers_->count_stall(started);
  return positions;
}

// What still reads the slot of a block that failed comes before what fills it.
void Tiers::hold_for_repair(const Block& block, Compute compute) {
  if (!device_->asynchronous()) return;
  for (const MarkPtr& mark : last_uses_.of(block.slot, block.slot_nbytes))
    device_->hold_compute(compute, mark);
  if (const auto leaving = leaving_.find(block.slot);
      leaving != leaving_.end() && leaving->second->issued())
    device_->hold_compute(compute, leaving->second->mark());
}

// Whether a block that is still on its way can be computed with already.
bool Tiers::hold_for(const Transfer& ticket, Compute compute, MarkPtr& held) {
  if (!device_->stream_ordered() || !ticket.issued()) return false;
  if (ticket.mark() != held) device_->hold_compute(compute, ticket.mark());
  held = ticket.mark();
  return true;
}

void Event::repaired(std::uint32_t position) {
  {
    const Tiers::Lock lock = tiers_->lock();
    check_held();
    Block& block = *tiers_->hbm_.find(keys_.at(position));
    if (block.state != State::failed) return;
    tiers_->repairs_.erase(block.key);
    tiers_->hbm_.mark_ready(block);
    if (!creates_) ++tiers_->stats_.num_repaired;
  }
  tiers_->changed_.notify_all();
}

}  // namespace tiered_mem
