#include "tiers.h"

#include <algorithm>
#include <chrono>

#include "error.h"

namespace tiered_mem {

namespace {

// Guesses hold at most this share of HBM, so that a bad predictor can't empty the tier.
constexpr std::uint64_t kGuessShare = 8;
// How long a waiting thread goes without looking whether it was interrupted.
constexpr std::chrono::milliseconds kPollEvery{100};

void check_distinct(const std::vector<Key>& keys) {
  std::vector<Key> sorted = keys;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
    throw ConfigError("the keys of an event are distinct; this one names a block twice");
}

}  // namespace

Tiers::Tiers(const TiersConfig& config, std::unique_ptr<Device> device, Poll poll)
    : device_(std::move(device)),
      poll_(std::move(poll)),
      hbm_(Arena(config.hbm_nbytes, config.hbm_reserved), make_policy(config.eviction)),
      dram_(Arena(config.dram_nbytes, config.dram_reserved), make_policy(config.eviction)),
      has_dram_(config.dram_nbytes > 0),
      max_guessed_nbytes_(config.hbm_nbytes / kGuessShare),
      engine_(config.num_io_threads, *device_) {
  hbm_memory_ = device_->allocate(hbm_.arena().reserved());
  dram_memory_ = make_host_device()->allocate(dram_.arena().reserved());
}

Tiers::~Tiers() { close(); }

void Tiers::check_open() const {
  if (closed_) throw RuntimeClosed("the runtime is closed; wrap the model again to use it");
}

void Tiers::add_blocks(const std::vector<Key>& keys, std::vector<Source> extents) {
  if (keys.size() != extents.size())
    throw ConfigError("add_blocks: as many extents as keys, please");
  Lock lock(mutex_);
  check_open();
  for (std::size_t i = 0; i < keys.size(); ++i) sources_.put(keys[i], std::move(extents[i]));
}

const Tiers::Source& Tiers::source_of(Key key) const {
  const Source* source = sources_.find(key);
  if (source == nullptr)
    throw ConfigError("block " + std::to_string(key) + " is unknown: call add_blocks first");
  return *source;
}

bool Tiers::resident(Key key) { return num_resident(&key, 1) == 1; }

std::size_t Tiers::num_resident(const Key* keys, std::size_t num_keys) {
  Lock lock(mutex_);
  return static_cast<std::size_t>(std::count_if(keys, keys + num_keys, [this](Key key) {
    const Block* block = hbm_.find(key);
    return block != nullptr && block->state == State::ready;
  }));
}

std::uint64_t Tiers::max_event(std::uint64_t nbytes) {
  Lock lock(mutex_);
  return hbm_.arena().max_slots(round_to_pages(nbytes));
}

// --- events ---

std::shared_ptr<Event> Tiers::acquire(const Key* keys, std::size_t num_keys, std::uint64_t stream,
                                      bool wait) {
  auto event = std::make_shared<Event>(shared_from_this(), num_keys);
  event->released_ = true;  // until it holds pins
  event->keys_.assign(keys, keys + num_keys);
  check_distinct(event->keys_);
  Lock lock(mutex_);
  for (;;) {
    check_open();
    const Admission admission = try_acquire(*event);
    if (admission == Admission::ok) break;
    if (admission == Admission::too_large)
      throw EventTooLarge("an event of " + std::to_string(num_keys) + " blocks of " +
                          std::to_string(source_of(keys[0])->nbytes) +
                          " bytes doesn't fit the HBM budget of " +
                          std::to_string(hbm_.arena().budget()) +
                          " bytes; raise hbm or split the event into waves");
    if (!wait) return nullptr;
    wait_changed(lock);
  }
  event->released_ = false;
  event->memory_ = hbm_memory_;
  ++clock_;
  ++stats_.num_events;
  settle_hints(*event, stream);
  return event;
}

Admission Tiers::try_acquire(Event& event) {
  const std::size_t num_keys = event.keys_.size();
  std::vector<Wanted> wanted;
  std::vector<Block*> present(num_keys, nullptr);
  for (std::size_t i = 0; i < num_keys; ++i) {
    present[i] = find_usable(event.keys_[i]);
    if (present[i] == nullptr)
      wanted.push_back({event.keys_[i], source_of(event.keys_[i])->nbytes});
    else if (!can_join(*present[i]))
      return Admission::busy;
  }

  // Pins first, so that making room for the missing keys can't evict the present ones.
  std::vector<Victim> victims;
  for (Block* block : present)
    if (block != nullptr) hbm_.pin(*block);
  const Admission admission =
      wanted.empty() ? Admission::ok : hbm_.admit(wanted, Entry::demanded, victims);
  if (admission != Admission::ok) {
    for (Block* block : present)
      if (block != nullptr) hbm_.unpin(*block);
    return admission;
  }
  handle_victims(victims);

  event.slots_.resize(num_keys);
  event.tickets_.resize(num_keys);
  for (std::size_t i = 0; i < num_keys; ++i) {
    if (present[i] != nullptr)
      join(event, i, *present[i]);
    else
      load(event, i, *hbm_.find(event.keys_[i]));
  }
  event.num_pending_ = num_keys - event.ready_.size();
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
    event.ready_.push_back(static_cast<std::uint32_t>(position));
  } else {
    ++stats_.num_in_flight;
    event.tickets_[position] = loads_.at(block.key);
  }
}

void Tiers::load(Event& event, std::size_t position, Block& block) {
  hbm_.pin(block);
  event.slots_[position] = block.slot;
  event.tickets_[position] = start_load(block, Priority::demand, 0);
  if (event.tickets_[position]->link == Link::dram_to_hbm) {
    ++stats_.num_dram_hits;
    return;
  }
  ++stats_.num_nvme_reads;
  stats_.nbytes_missed += event.tickets_[position]->nbytes;
}

void Tiers::release(Event& event) {
  {
    Lock lock(mutex_);
    for (Key key : event.keys_) hbm_.unpin(*hbm_.find(key));
    finish_resize();
  }
  changed_.notify_all();
}

// A waiting thread looks up now and then whether it was interrupted.
void Tiers::wait_changed(Lock& lock) {
  if (changed_.wait_for(lock, kPollEvery) == std::cv_status::no_timeout) return;
  lock.unlock();
  poll_();
  lock.lock();
}

Event::Event(std::shared_ptr<Tiers> tiers, std::size_t num_keys) : tiers_(std::move(tiers)) {
  keys_.reserve(num_keys);
}

Event::~Event() { release(); }

void Event::release() {
  if (released_) return;
  released_ = true;
  tiers_->release(*this);
}

std::vector<std::uint32_t> Event::wait_any(std::vector<Failure>& failures) {
  std::vector<std::uint32_t> positions;
  positions.swap(ready_);
  if (num_pending_ == 0) return positions;
  const auto started = std::chrono::steady_clock::now();
  bool waited = false;
  Tiers::Lock lock(tiers_->mutex_);
  for (;;) {
    for (std::uint32_t i = 0; i < tickets_.size(); ++i) {
      const auto& ticket = tickets_[i];
      if (!ticket || !ticket->ended()) continue;
      if (ticket->status() == Transfer::Status::cancelled) tiers_->check_open();
      if (ticket->status() == Transfer::Status::done)
        positions.push_back(i);
      else
        failures.push_back({i, ticket->error()});
      tickets_[i] = nullptr;
      --num_pending_;
    }
    if (!positions.empty() || !failures.empty() || num_pending_ == 0) break;
    tiers_->check_open();
    waited = true;
    tiers_->wait_changed(lock);
  }
  if (waited)
    tiers_->stats_.stall_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now() - started)
                                   .count();
  return positions;
}

void Event::repaired(std::uint32_t position) {
  Tiers::Lock lock(tiers_->mutex_);
  Block* block = tiers_->hbm_.find(keys_.at(position));
  if (block == nullptr || block->state != State::failed) return;
  tiers_->hbm_.mark_ready(*block);
  ++tiers_->stats_.num_repaired;
  lock.unlock();
  tiers_->changed_.notify_all();
}

// --- transfers ---

Tiers::Ticket Tiers::start_load(Block& block, Priority priority, std::uint32_t rank) {
  const Key key = block.key;
  auto transfer = std::make_shared<Transfer>();
  transfer->target = hbm(block.slot);
  transfer->keep_alive = {hbm_memory_, dram_memory_};
  transfer->due = clock_;
  transfer->probability = -static_cast<double>(rank);
  if (const auto leaving = leaving_.find(block.slot); leaving != leaving_.end())
    transfer->after.push_back(leaving->second);
  Block* copy = has_dram_ ? dram_.find(key) : nullptr;
  if (copy != nullptr && copy->state != State::failed) {
    transfer->link = Link::dram_to_hbm;
    transfer->nbytes = copy->slot_nbytes;
    transfer->source = dram(copy->slot);
    dram_.pin(*copy);
    if (const auto arriving = demotions_.find(key); arriving != demotions_.end())
      transfer->after.push_back(arriving->second);
  } else {
    transfer->link = Link::nvme_to_hbm;
    transfer->extent = source_of(key);
    transfer->nbytes = transfer->extent->nbytes;
  }
  transfer->on_end = [this, key](Transfer& ended) { on_load_end(key, ended); };
  loads_[key] = transfer;
  if (!engine_.submit(transfer, priority)) throw RuntimeClosed("the runtime is closed");
  return transfer;
}

void Tiers::on_load_end(Key key, const Transfer& transfer) {
  {
    Lock lock(mutex_);
    settle_load(key, transfer);
  }
  changed_.notify_all();
}

// Does the accounts of an ended load, once: an acquire that finds it ended may come first.
void Tiers::settle_load(Key key, const Transfer& transfer) {
  const auto found = loads_.find(key);
  if (found == loads_.end() || found->second.get() != &transfer) return;
  const Ticket keep = found->second;
  loads_.erase(found);
  if (transfer.link == Link::dram_to_hbm) {
    Block& copy = *dram_.find(key);
    dram_.unpin(copy);
    dram_.demote_rank(copy);
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

void Tiers::handle_victims(const std::vector<Victim>& victims) {
  for (const Victim& victim : victims) {
    if (victim.unused_guess) stats_.nbytes_prefetch_wasted += victim.nbytes;
    if (has_dram_ && victim.slot_reused && !victim.unused_guess) start_demotion(victim);
  }
}

// Copies a block that leaves HBM to DRAM, unless it still lies there or DRAM has no room now.
Tiers::Ticket Tiers::start_demotion(const Victim& victim) {
  if (dram_.find(victim.key) != nullptr) return nullptr;
  std::vector<Victim> dropped;
  if (dram_.admit({{victim.key, victim.nbytes}}, Entry::demanded, dropped) != Admission::ok)
    return nullptr;
  auto transfer = std::make_shared<Transfer>();
  transfer->link = Link::hbm_to_dram;
  transfer->nbytes = victim.nbytes;
  transfer->source = hbm(victim.slot);
  transfer->target = dram(dram_.find(victim.key)->slot);
  transfer->keep_alive = {hbm_memory_, dram_memory_};
  transfer->on_end = [this, key = victim.key, slot = victim.slot](Transfer& ended) {
    on_demotion_end(key, slot, ended);
  };
  hbm_.hold(victim.slot);
  demotions_[victim.key] = transfer;
  leaving_[victim.slot] = transfer;
  if (!engine_.submit(transfer, Priority::demand)) throw RuntimeClosed("the runtime is closed");
  return transfer;
}

void Tiers::on_demotion_end(Key key, Slot hbm_slot, const Transfer& transfer) {
  {
    Lock lock(mutex_);
    demotions_.erase(key);
    hbm_.unhold(hbm_slot);
    if (const auto found = leaving_.find(hbm_slot);
        found != leaving_.end() && found->second.get() == &transfer)
      leaving_.erase(found);
    Block& block = *dram_.find(key);
    if (transfer.status() == Transfer::Status::done)
      dram_.mark_ready(block);
    else
      dram_.mark_failed(block);
  }
  changed_.notify_all();
}

// --- hints ---

void Tiers::hint(const Key* keys, std::size_t num_keys, std::uint64_t stream, bool exact) {
  if (num_keys == 0) return;
  Lock lock(mutex_);
  check_open();
  const Partition partition = partition_of(keys[0]);
  for (std::size_t i = 0; i < num_keys; ++i)
    if (partition_of(keys[i]) != partition)
      throw ConfigError("the keys of a hint are of one layer");
  for (const Hint& stale : hints_.take(stream, partition)) drop_hint(stale);
  std::vector<Hint> hints;
  for (std::uint32_t rank = 0; rank < num_keys; ++rank)
    hints.push_back({keys[rank], rank, hbm_.find(keys[rank]) == nullptr});
  stats_.num_hints += num_keys;

  // What is predicted and present stays, at least as far as other guesses are concerned.
  for (const Hint& hint : hints)
    if (!hint.missing) hbm_.protect(*hbm_.find(hint.key), true);

  for (const Hint& hint : hints) {
    if (!hint.missing || !(exact || hints_.pays(partition, hint.rank))) continue;
    const std::uint64_t nbytes = round_to_pages(source_of(hint.key)->nbytes);
    if (hbm_.nbytes_guessed() + nbytes > std::max(max_guessed_nbytes_, nbytes)) break;
    std::vector<Victim> victims;
    if (hbm_.admit({{hint.key, nbytes}}, Entry::guessed, victims) != Admission::ok) break;
    handle_victims(victims);
    Block& block = *hbm_.find(hint.key);
    hbm_.protect(block, true);
    start_load(block, Priority::prefetch, hint.rank);
    ++stats_.num_prefetched;
  }
  for (const Hint& forgotten : hints_.open(stream, partition, std::move(hints)))
    drop_hint(forgotten);
}

// The router has spoken: wrong hints are cancelled. Right ones have become demands in `acquire`.
void Tiers::settle_hints(const Event& event, std::uint64_t stream) {
  if (event.keys_.empty()) return;
  const Partition partition = partition_of(event.keys_[0]);
  for (const Hint& hint : hints_.take(stream, partition)) {
    const bool right =
        std::find(event.keys_.begin(), event.keys_.end(), hint.key) != event.keys_.end();
    hints_.judge(partition, hint, right);
    if (!right) drop_hint(hint);
  }
}

void Tiers::drop_hint(const Hint& hint) {
  Block* block = hbm_.find(hint.key);
  if (block == nullptr) return;
  hbm_.protect(*block, false);
  if (!block->guessed || block->state != State::loading) return;
  const Ticket ticket = loads_.at(hint.key);
  if (engine_.cancel(ticket)) settle_load(hint.key, *ticket);
}

std::map<Partition, HintBook::Precision> Tiers::precision() {
  Lock lock(mutex_);
  return hints_.precision();
}

// --- the rest of a runtime's life ---

void Tiers::remove_space(std::uint8_t space) {
  Lock lock(mutex_);
  for (;;) {
    if (closed_) return;
    std::vector<Key> left;
    bool busy = false;
    hbm_.each([&](Block& block) {
      if (space_of(block.key) == space) left.push_back(block.key);
    });
    for (Key key : left) {
      Block& block = *hbm_.find(key);
      if (block.state == State::loading && block.pins == 0 && loads_.count(key)) {
        const Ticket ticket = loads_.at(key);
        if (engine_.cancel(ticket)) settle_load(key, *ticket);
        busy = true;
      } else if (block.pins > 0) {
        busy = true;
      } else {
        hbm_.drop(block);
      }
    }
    left.clear();
    dram_.each([&](Block& block) {
      if (space_of(block.key) == space) left.push_back(block.key);
    });
    for (Key key : left) {
      Block& block = *dram_.find(key);
      if (block.pins > 0 || block.state == State::loading)
        busy = true;
      else
        dram_.drop(block);
    }
    if (!busy) break;
    wait_changed(lock);
  }
  std::vector<Key> known;
  sources_.each([&](Key key, const Source&) {
    if (space_of(key) == space) known.push_back(key);
  });
  for (Key key : known) sources_.erase(key);
}

bool Tiers::resize(Residency& residency, Memory& memory, std::uint64_t nbytes) {
  std::vector<Arena::Slab> released;
  const bool complete = residency.resize(nbytes, released);
  for (const Arena::Slab& slab : released) memory.decommit(slab.offset, slab.nbytes());
  return complete;
}

// A shrink that pins held up goes on when they are gone.
void Tiers::finish_resize() {
  if (closed_) return;
  const auto over = [](const Arena& arena) { return arena.nbytes_cut() > arena.budget(); };
  if (over(hbm_.arena())) resize(hbm_, *hbm_memory_, hbm_.arena().budget());
  if (over(dram_.arena())) resize(dram_, *dram_memory_, dram_.arena().budget());
}

bool Tiers::resize_hbm(std::uint64_t nbytes) {
  Lock lock(mutex_);
  check_open();
  max_guessed_nbytes_ = nbytes / kGuessShare;
  return resize(hbm_, *hbm_memory_, nbytes);
}

bool Tiers::resize_dram(std::uint64_t nbytes) {
  Lock lock(mutex_);
  check_open();
  has_dram_ = nbytes > 0;
  return resize(dram_, *dram_memory_, nbytes);
}

std::shared_ptr<Memory> Tiers::hbm_memory() {
  Lock lock(mutex_);
  check_open();
  return hbm_memory_;
}

TiersStats Tiers::stats() {
  Lock lock(mutex_);
  TiersStats now = stats_;
  now.num_evictions = hbm_.num_evictions();
  for (std::size_t i = 0; i < kNumLinks; ++i)
    now.nbytes_moved[i] = engine_.nbytes_moved(static_cast<Link>(i));
  return now;
}

std::uint64_t Tiers::hbm_nbytes_used() {
  Lock lock(mutex_);
  return hbm_.nbytes_used();
}

std::uint64_t Tiers::dram_nbytes_used() {
  Lock lock(mutex_);
  return dram_.nbytes_used();
}

bool Tiers::closed() {
  Lock lock(mutex_);
  return closed_;
}

void Tiers::close() {
  {
    Lock lock(mutex_);
    if (closed_) return;
    closed_ = true;
  }
  changed_.notify_all();
  engine_.stop();
  Lock lock(mutex_);
  hbm_memory_.reset();
  dram_memory_.reset();
  sources_ = {};
  changed_.notify_all();
}

}  // namespace tiered_mem
