#include "tiers.h"

#include <algorithm>
#include <chrono>

#include "error.h"

namespace tiered_mem {

namespace {

// Guesses hold at most this share of HBM, so that a bad predictor can't empty the tier.
constexpr std::uint64_t kGuessShare = 8;

std::size_t checked_num_threads(std::size_t num_threads) {
  if (num_threads == 0) throw ConfigError("num_io_threads is 0; it must be at least 1");
  return num_threads;
}

std::unique_ptr<EvictionPolicy> make_hbm_policy(const TiersConfig& config) {
  if (!config.future) return make_policy(config.eviction);
  if (config.eviction != "belady" || !config.virtual_links || config.dram_nbytes > 0)
    throw ConfigError("a future is for belady, on virtual links and without DRAM");
  return make_belady(*config.future);
}

// On virtual links nothing is ever touched, so that reserved memory costs nothing.
TransferEngine make_engine(const TiersConfig& config, Device& device) {
  if (config.virtual_links) return TransferEngine(*config.virtual_links);
  return TransferEngine(checked_num_threads(config.num_io_threads), device,
                        device.asynchronous() ? kDevicePace : PrefetchPace{},
                        config.watchdog_seconds);
}

Arena make_hbm_arena(const TiersConfig& config, const Device& device) {
  if (device.host_accessible()) return Arena(config.hbm_nbytes, config.hbm_reserved);
  return Arena::of_ranges(config.hbm_nbytes);
}

}  // namespace

Tiers::Tiers(const TiersConfig& config, std::shared_ptr<Device> device, Poll poll)
    : device_(std::move(device)),
      poll_(std::move(poll)),
      hbm_(make_hbm_arena(config, *device_), make_hbm_policy(config)),
      dram_(Arena(config.dram_nbytes, config.dram_reserved),
            make_policy(config.future ? "lru" : config.eviction)),
      has_dram_(config.dram_nbytes > 0),
      copy_back_(config.copy_back),
      max_guessed_nbytes_(config.hbm_nbytes / kGuessShare),
      engine_(make_engine(config, *device_)) {
  if (device_->host_accessible())
    hbm_memory_ = device_->allocate(hbm_.arena().reserved());
  else
    hbm_memory_ = segments_ = std::make_shared<Segments>();
  engine_.set_on_issued([this] {
    {
      const std::lock_guard lock(mutex_);
    }  // whoever looked before is waiting now
    changed_.notify_all();
  });
  dram_memory_ = std::make_shared<PinnedMemory>(
      make_host_device()->allocate(dram_.arena().reserved()), device_);
}

Tiers::~Tiers() { shut(); }

void Tiers::destroy(Tiers* tiers) {
  if (!tiers->forked()) delete tiers;
}

Tiers::Lock Tiers::lock() {
  if (forked())
    throw RuntimeClosed("a runtime stays in the process that made it; make one in the child");
  refuse_in_policy();
  Lock held(mutex_);
  settle_ended();
  return held;
}

void Tiers::refuse_in_policy() {
  if (PolicyCall::active())
    throw ConfigError("a policy can't call a runtime: policies choose, the runtime acts");
}

void Tiers::check_open() const {
  if (closed_) throw RuntimeClosed("the runtime is closed; wrap the model again to use it");
  if (const std::exception_ptr error = engine_.device_error()) std::rethrow_exception(error);
}

void Tiers::add_segment(std::shared_ptr<Memory> segment) {
  if (!segments_) throw ConfigError("this runtime's HBM is host memory: it has no segments");
  const Lock held = lock();
  check_open();
  hbm_.add_range(reinterpret_cast<std::uintptr_t>(segment->data()), segment->nbytes());
  segments_->add(std::move(segment));
  changed_.notify_all();
}

void Tiers::add_blocks(const std::vector<Key>& keys, std::vector<Source> extents) {
  if (keys.size() != extents.size())
    throw ConfigError("add_blocks: as many extents as keys, please");
  const Lock held = lock();
  check_open();
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (!extents[i] || extents[i]->nbytes == 0)
      throw ConfigError("block " + std::to_string(keys[i]) + " is empty: a block has bytes");
    if (!extents[i]->file && !engine_.is_virtual())
      throw ConfigError("blocks that lie nowhere are for virtual links");
    const Source* known = sources_.find(keys[i]);
    if (known != nullptr && (*known)->nbytes != extents[i]->nbytes)
      throw ConfigError("block " + std::to_string(keys[i]) +
                        " is known with another size: remove its space first");
  }
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
  const Lock held = lock();
  return static_cast<std::size_t>(std::count_if(keys, keys + num_keys, [this](Key key) {
    const Block* block = hbm_.find(key);
    return block != nullptr && block->state == State::ready;
  }));
}

std::uint64_t Tiers::max_event(std::uint64_t nbytes) {
  if (nbytes == 0) throw ConfigError("max_event: a block has bytes");
  const Lock held = lock();
  return hbm_.arena().max_slots(round_to_pages(nbytes));
}

void Tiers::remove_space(std::uint8_t space) {
  std::vector<Key> known;
  {
    const Lock held = lock();
    hints_.forget(space);
    sources_.each([&](Key key, const Source&) {
      if (space_of(key) == space) known.push_back(key);
    });
  }
  remove_blocks(known);
}

void Tiers::remove_blocks(const std::vector<Key>& keys) {
  Lock held = lock();
  for (Clock::time_point next_poll{};;) {
    if (closed_) return;
    bool busy = false;
    for (Key key : keys) {
      busy |= !drop_from_hbm(key);
      busy |= !drop_from_dram(key);
    }
    if (!busy) break;
    wait_changed(held, next_poll);
  }
  for (Key key : keys) sources_.erase(key);
}

// False while something uses it.
bool Tiers::drop_from_hbm(Key key) {
  Block* block = hbm_.find(key);
  if (block == nullptr) return true;
  if (block->pins > 0) return false;
  if (block->state == State::loading) return cancel_load(key);
  hbm_.drop(*block);
  return true;
}

bool Tiers::drop_from_dram(Key key) {
  Block* block = dram_.find(key);
  if (block == nullptr) return true;
  if (block->pins > 0 || block->state == State::loading) return false;
  dram_.drop(*block);
  return true;
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
  try {
    if (over(hbm_.arena())) resize(hbm_, *hbm_memory_, hbm_.arena().budget());
    if (over(dram_.arena())) resize(dram_, *dram_memory_, dram_.arena().budget());
  } catch (const PolicyError&) {  // callers that release may not fail; the next acquire throws it
    policy_error_ = std::current_exception();
  }
}

bool Tiers::resize_hbm(std::uint64_t nbytes) {
  std::vector<Leaving> leaving;
  bool complete = false;
  {
    const Lock held = lock();
    check_open();
    complete = resize(hbm_, *hbm_memory_, nbytes);
    leaving = take_idle_segments();
    max_guessed_nbytes_ = nbytes / kGuessShare;
  }
  changed_.notify_all();
  let_go(std::move(leaving));
  return complete;
}

bool Tiers::resize_dram(std::uint64_t nbytes) {
  const Lock held = lock();
  check_open();
  const bool complete = resize(dram_, *dram_memory_, nbytes);
  has_dram_ = nbytes > 0;
  return complete;
}

std::vector<Tiers::Leaving> Tiers::take_idle_segments() {
  std::vector<Leaving> leaving;
  if (!segments_ || closed_) return leaving;
  while (const auto first = hbm_.take_idle_range()) {
    const std::shared_ptr<Memory> segment = segments_->take(*first);
    leaving.push_back({segment, last_uses_.of(*first, segment->nbytes())});
    last_uses_.forget(*first, segment->nbytes());
  }
  return leaving;
}

// Without the lock: it waits for computing, and memory that is Python's takes the GIL to go.
void Tiers::let_go(std::vector<Leaving> leaving) {
  try {
    for (const Leaving& each : leaving)
      for (const MarkPtr& mark : each.marks) device_->wait(mark);
  } catch (const Error&) {  // a device that failed may still read there
    new std::vector<Leaving>(std::move(leaving));
  }
}

std::uint64_t Tiers::pin_dram(std::uint64_t nbytes) {
  std::shared_ptr<PinnedMemory> memory;
  std::uint64_t end = 0;
  {
    const Lock held = lock();
    check_open();
    memory = dram_memory_;
    if (const auto& slabs = dram_.arena().slabs(); !slabs.empty())
      end = slabs.rbegin()->first + slabs.rbegin()->second.nbytes();
  }
  return memory->pin(end, nbytes);
}

void Tiers::throttle(Link link, double bytes_per_second) {
  if (!(bytes_per_second >= 0)) throw ConfigError("a link's rate is at least 0 bytes per second");
  const Lock held = lock();
  engine_.throttle(link, bytes_per_second);
}

double Tiers::now() {
  const Lock held = lock();
  return engine_.now();
}

void Tiers::advance(double seconds) {
  {
    const Lock held = lock();
    check_open();
    if (!engine_.is_virtual()) throw ConfigError("advance: this runtime runs on real time");
  }
  engine_.advance(seconds);  // transfers that end take the lock
}

void Tiers::keep_log(bool on) {
  const Lock held = lock();
  logging_ = on;
}

std::vector<LogEntry> Tiers::take_log() {
  const Lock held = lock();
  std::vector<LogEntry> taken;
  taken.swap(log_);
  return taken;
}

std::shared_ptr<Memory> Tiers::hbm_memory() {
  const Lock held = lock();
  check_open();
  return hbm_memory_;
}

TiersStats Tiers::stats() {
  const Lock held = lock();
  TiersStats now = stats_;
  now.num_evictions = hbm_.num_evictions();
  for (std::size_t i = 0; i < kNumLinks; ++i)
    now.nbytes_moved[i] = engine_.nbytes_moved(static_cast<Link>(i));
  return now;
}

std::uint64_t Tiers::hbm_nbytes_used() {
  const Lock held = lock();
  return hbm_.nbytes_used();
}

std::uint64_t Tiers::dram_nbytes_used() {
  const Lock held = lock();
  return dram_.nbytes_used();
}

bool Tiers::closed() {
  if (forked()) return true;
  const Lock held = lock();
  return closed_;
}

void Tiers::close() {
  if (forked()) return;
  refuse_in_policy();
  shut();
}

void Tiers::shut() {
  {
    Lock lock(mutex_);
    if (closed_) return;
    closed_ = true;
  }
  changed_.notify_all();
  engine_.stop();
  std::vector<Leaving> leaving(1);
  std::shared_ptr<Memory> dram;  // unpinning takes long
  {
    Lock lock(mutex_);
    settle_ended();
    segments_.reset();
    leaving[0].memory = std::move(hbm_memory_);
    if (!engine_.device_error()) leaving[0].marks = last_uses_.all();
    dram = std::move(dram_memory_);
    sources_ = {};
  }
  changed_.notify_all();
  let_go(std::move(leaving));
}

}  // namespace tiered_mem
