// The runtime: HBM and DRAM residency, their memory, the transfers between them and the store.
//
// One lock guards residency, tickets and hints; it is never held while bytes move. Engine and
// lock are always taken in the order lock -> engine, so nothing here is called by the engine
// while the engine holds its own lock.
//
// DRAM holds what HBM lets go (a victim is copied back over the idle direction) and keeps what
// HBM takes from it as the first to leave, so the two together hold nearly the sum of both
// budgets, and no block is copied back that still lies in DRAM. Where copies back would slow those
// in down (`copy_back` off), DRAM gets what is read from NVMe, on its way, and HBM's victims go.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "direct_io.h"
#include "hints.h"
#include "last_uses.h"
#include "pinned_memory.h"
#include "process.h"
#include "residency.h"
#include "segments.h"
#include "transfer.h"

namespace tiered_mem {

struct TiersConfig {
  std::uint64_t hbm_nbytes = 0;
  std::uint64_t dram_nbytes = 0;   // 0: no DRAM tier
  std::uint64_t hbm_reserved = 0;  // what resize may grow to
  std::uint64_t dram_reserved = 0;
  std::string eviction = "lru";
  std::size_t num_io_threads = 4;
  double watchdog_seconds = 60;
  /// Whether DRAM gets what HBM lets go, over the link's idle direction, so that the two tiers hold
  /// different blocks. Else what is read goes through DRAM and stays there.
  bool copy_back = true;
  /// Virtual links: no bytes move, and time passes on a virtual clock.
  std::optional<LinkSpeeds> virtual_links;
  /// Every use to come of HBM's blocks, in order: for the policy that knows it, without DRAM.
  std::optional<std::vector<Key>> future;
};

/// What happened to a block, in the order of the decisions.
enum class Happening : std::uint8_t {
  event,      // begins; the key is the first of its keys
  hit,        // in HBM
  in_flight,  // on its way by a hint or another event
  dram_hit,
  nvme_read,
  prefetch,  // a hint became a transfer
  evict,     // left HBM
};
struct LogEntry {
  Happening happening;
  Key key;
};

/// Counts since the start. Hits and misses count keys of events, a key in flight is no hit.
struct TiersStats {
  std::uint64_t num_events = 0;
  std::uint64_t num_hbm_hits = 0;
  std::uint64_t num_in_flight = 0;  // on their way by a hint or another event
  std::uint64_t num_dram_hits = 0;
  std::uint64_t num_nvme_reads = 0;
  std::uint64_t num_evictions = 0;
  std::uint64_t nbytes_hit = 0;
  std::uint64_t nbytes_missed = 0;  // demanded, not in HBM or DRAM, hence read from NVMe
  std::uint64_t num_hints = 0;
  std::uint64_t num_prefetched = 0;       // transfers that hints caused
  std::uint64_t num_prefetched_used = 0;  // of these, used by an event
  std::uint64_t nbytes_prefetch_used = 0;
  std::uint64_t nbytes_prefetch_wasted = 0;
  std::uint64_t num_failed = 0;
  std::uint64_t num_repaired = 0;
  std::uint64_t stall_ns = 0;  // spent waiting with nothing ready to compute on
  std::array<std::uint64_t, kNumLinks> nbytes_moved{};
};

class Tiers;

/// A layer step and all its keys: pinned in HBM until `release`. Meant for one thread at a time.
class Event {
 public:
  struct Failure {
    std::uint32_t position;
    std::exception_ptr error;
  };

  Event(std::shared_ptr<Tiers> tiers, const Key* keys, std::size_t num_keys, std::uint64_t stream);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  const std::vector<Key>& keys() const { return keys_; }
  /// HBM slots (byte offsets, or addresses where HBM is in segments), by position in `keys`.
  const std::vector<Slot>& slots() const { return slots_; }
  /// Positions whose bytes are in place, for what is given to `compute` from now on, and that no
  /// earlier call returned. Waits until there is one; empty when all have been returned. `failures`
  /// gets the positions whose transfer failed: theirs to repair until the next call; other streams'
  /// events with these blocks wait meanwhile. Throws RuntimeClosed, ConfigError after `release`.
  std::vector<std::uint32_t> wait_any(std::vector<Failure>& failures, Compute compute = 0);
  /// The caller has filled the slot of a failed, or created, position itself. Throws ConfigError
  /// after `release`, std::out_of_range.
  void repaired(std::uint32_t position);
  /// Ends the pins: the slots may be filled with other blocks once `compute` has done what it was
  /// given until now. A second call does nothing.
  void release(Compute compute = 0);

 private:
  friend class Tiers;
  void check_held() const;

  std::shared_ptr<Tiers> tiers_;
  std::shared_ptr<Memory> memory_;  // outlives the runtime while somebody may still read a slot
  std::vector<Key> keys_;
  std::uint64_t stream_;
  Compute compute_ = 0;  // where it was last waited for
  std::vector<Slot> slots_;
  std::vector<std::shared_ptr<Transfer>> tickets_;  // by position; null when returned or resident
  std::vector<std::uint32_t> ready_;
  std::size_t num_pending_ = 0;
  bool released_ = true;  // until it holds pins
  bool creates_ = false;  // its blocks come from the caller, not from the store
};

class Tiers : public std::enable_shared_from_this<Tiers> {
 public:
  /// Called now and then, without the lock, by a thread that waits; throws to give up.
  using Poll = std::function<void()>;

  /// Throws ConfigError, BudgetError if the memory can't be reserved.
  Tiers(const TiersConfig& config, std::shared_ptr<Device> device, Poll poll);
  ~Tiers();
  /// What the owners of a `Tiers` must delete it by: in a forked child it is left alone, since
  /// its threads, and whoever held its locks, aren't there. Every other call in a child throws
  /// RuntimeClosed.
  static void destroy(Tiers* tiers);

  /// Tells where blocks come from. Replaces what was known of a key, but for its size. Throws
  /// ConfigError.
  void add_blocks(const std::vector<Key>& keys, std::vector<std::shared_ptr<const Extent>> extents);
  /// Memory of a device for HBM, beside what it has. Throws ConfigError where HBM is host memory.
  void add_segment(std::shared_ptr<Memory> segment);
  /// Forgets all blocks of a model, waiting for its transfers and events.
  void remove_space(std::uint8_t space);
  /// Forgets these blocks, of whom no event or hint may come, waiting for those there are. What
  /// isn't known is left out.
  void remove_blocks(const std::vector<Key>& keys);

  /// Pins all keys of an event (distinct, known) and starts what is missing. Waits while other
  /// events' pins are in the way, or, if `wait` is false, returns nullptr. Throws EventTooLarge
  /// if the tier can't hold the event, RuntimeClosed, ConfigError for an unknown key.
  ///
  /// Waiting events are served in the order they came, so that small ones can't starve a large
  /// one. A stream (a sequence of events, such as a thread's) that holds an event goes ahead of
  /// those that wait: they may be waiting for it.
  std::shared_ptr<Event> acquire(const Key* keys, std::size_t num_keys, std::uint64_t stream,
                                 bool wait);

  /// Gives blocks that are in HBM for the first time slots that the caller fills, on `compute`:
  /// `Event::repaired` says of which. They are pinned, and dropped at `release` if they weren't
  /// filled. Waits as `acquire` does. Throws what that throws, ConfigError if a block is in HBM.
  std::shared_ptr<Event> create(const Key* keys, std::size_t num_keys, std::uint64_t stream,
                                Compute compute);

  /// Pins the blocks if all of them are in HBM and ready; else returns nullptr. Counts nothing and
  /// tells no policy: that is for `note_uses`, when it is known which of them were used.
  std::shared_ptr<Event> acquire_resident(const Key* keys, std::size_t num_keys,
                                          std::uint64_t stream);
  /// Counts an event that used these blocks in HBM, and tells the policy.
  void note_uses(const Key* keys, std::size_t num_keys);

  /// Predicts the next event of a partition: keys of one partition, the likeliest first. `exact`
  /// hints are right by construction and needn't prove that they pay.
  void hint(const Key* keys, std::size_t num_keys, std::uint64_t stream, bool exact);

  /// Whether a block is in HBM and ready.
  bool resident(Key key);
  /// Settles hints by all keys of an event that will be acquired in several waves. Returns which
  /// of them are in HBM or on their way.
  std::vector<bool> announce(const Key* keys, std::size_t num_keys, std::uint64_t stream);
  std::size_t num_resident(const Key* keys, std::size_t num_keys);
  /// The most blocks of this size that an event can hold.
  std::uint64_t max_event(std::uint64_t nbytes);
  /// False if pins or transfers hold memory back: it is given back as they end. Throws
  /// BudgetError above what was reserved.
  bool resize_hbm(std::uint64_t nbytes);
  bool resize_dram(std::uint64_t nbytes);
  /// Lets the device reach at most so many bytes more of DRAM's used memory without staging.
  /// Returns how many; 0 when there is nothing left to do. Throws DeviceError.
  std::uint64_t pin_dram(std::uint64_t nbytes);
  /// Throws ConfigError for a negative rate; 0 is no limit.
  void throttle(Link link, double bytes_per_second);

  /// Seconds on this runtime's clock.
  double now();
  /// Lets time pass on a virtual clock, as computing would. Throws ConfigError on a real one.
  void advance(double seconds);

  /// Starts or ends keeping a log.
  void keep_log(bool on);
  /// What was logged since the last call.
  std::vector<LogEntry> take_log();

  TiersStats stats();
  std::map<Partition, HintBook::Precision> precision();
  std::uint64_t hbm_nbytes_used();
  std::uint64_t dram_nbytes_used();
  std::shared_ptr<Memory> hbm_memory();
  /// Cancels transfers, wakes waiting events with RuntimeClosed, gives the memory up. Throws
  /// ConfigError inside a policy.
  void close();
  bool closed();

 private:
  friend class Event;
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;
  using Ticket = std::shared_ptr<Transfer>;
  using Source = std::shared_ptr<const Extent>;

  void shut();
  bool forked() const { return generation_ != process_generation(); }
  Lock lock();
  static void refuse_in_policy();
  void check_open() const;
  const Source& source_of(Key key) const;
  Admission try_acquire(Event& event);
  Block* find_usable(Key key);
  bool can_join(const Block& block);
  void join(Event& event, std::size_t position, Block& block);
  void load(Event& event, std::size_t position, Block& block);
  void await_bytes(Event& event, std::size_t position, Block& block);
  bool still_leaves(Slot slot) const;
  void hold_event(Event& event);
  void begin_event(const std::vector<Key>& keys);
  void abandon_repairs(const Event* event);
  bool others_repair(const Event& event, Key key) const;
  void log(Happening happening, Key key) {
    if (logging_) log_.push_back({happening, key});
  }
  void rethrow_policy_errors();
  void wait_for_room(Lock& lock, Event& event);
  void count_stall(double since);
  bool cancel_guesses(const Event& event);
  bool cancel_load(Key key);
  bool drop_from_hbm(Key key);
  bool drop_from_dram(Key key);
  void settle_hints(const Key* keys, std::size_t num_keys, std::uint64_t stream);
  void drop_hint(const Hint& hint);
  void submit(const Ticket& transfer, Priority priority, Key key);
  Ticket start_load(Block& block, Priority priority, std::uint32_t rank);
  void start_demotion(const Victim& victim, Priority priority);
  void start_feeding(Key key, Priority priority, std::uint32_t rank);
  Block* admit_to_dram(Key key, std::uint64_t nbytes);
  void handle_victims(const std::vector<Victim>& victims, Priority priority);
  struct Ended {
    Key key;
    Slot hbm_slot;  // that was left, if it was a copy to DRAM
    Ticket ticket;
  };
  void on_end(Ended ended);
  void settle_ended();
  void settle_demotion(const Ended& ended);
  void settle_load(Key key, const Transfer& transfer);
  void wait_changed(Lock& lock, Clock::time_point& next_poll);
  void release(Event& event, Compute compute);
  struct Orphan;
  void unpin_all(const Orphan& holds);
  void hold_for_repair(const Block& block, Compute compute);
  bool hold_for(const Transfer& ticket, Compute compute, MarkPtr& held);
  void guard_slots(const std::vector<Key>& keys, Compute compute);
  void await_compute(Compute compute) noexcept;
  // Memory that goes once nothing that was computed can still be reading it.
  struct Leaving {
    std::shared_ptr<Memory> memory;
    std::vector<MarkPtr> marks;
  };
  std::vector<Leaving> take_idle_segments();
  void let_go(std::vector<Leaving> leaving);
  void orphan(Event& event);
  void release_orphans();
  bool resize(Residency& residency, Memory& memory, std::uint64_t nbytes);
  void finish_resize();
  std::byte* hbm(Slot slot) const {
    return reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(hbm_memory_->data()) +
                                        slot);
  }
  std::byte* dram(Slot slot) const { return dram_memory_->data() + slot; }

  const unsigned generation_ = process_generation();
  std::shared_ptr<Device> device_;
  Poll poll_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> closed_{false};
  std::shared_ptr<Memory> hbm_memory_;
  std::shared_ptr<Segments> segments_;  // null: HBM is host memory; else the same as hbm_memory_
  std::shared_ptr<PinnedMemory> dram_memory_;
  LastUses last_uses_;
  Residency hbm_, dram_;
  bool has_dram_;
  bool copy_back_;
  std::uint64_t max_guessed_nbytes_;
  FlatMap<Source> sources_;
  std::unordered_map<Key, Ticket> loads_;      // into HBM, in flight
  std::unordered_map<Key, Ticket> demotions_;  // into DRAM, in flight
  std::unordered_map<Slot, Ticket> leaving_;   // HBM slots whose last block is being copied out
  std::vector<Ended> ended_;                   // transfers not yet in the accounts
  std::deque<const Event*> queue_;             // waiting for room, oldest first
  std::unordered_map<std::uint64_t, std::uint32_t> holders_;  // unreleased events by stream
  struct Repairer {
    const Event* event;  // compared only: it may be gone
    std::uint64_t stream;
  };
  std::unordered_map<Key, Repairer> repairs_;  // failed blocks that an event may be filling now
  std::unordered_map<std::uint64_t, std::size_t> announced_;  // keys left to acquire, by stream
  HintBook hints_;
  std::uint64_t clock_ = 0;  // events and hints so far: orders prefetches
  TiersStats stats_;
  // Events whose owners went without a release, by their keys and streams: settled by the next
  // caller, since a garbage collection may end an event anywhere, a policy's call included.
  struct Orphan {
    std::vector<Key> keys;
    std::vector<Slot> slots;
    std::uint64_t stream;
    Compute compute;
    const Event* event;
  };
  std::mutex orphans_mutex_;
  std::vector<Orphan> orphans_;
  std::atomic<bool> has_orphans_{false};
  bool logging_ = false;
  std::vector<LogEntry> log_;
  std::exception_ptr policy_error_;  // a plug-in's, where it couldn't be thrown
  TransferEngine engine_;            // last: its threads end before the rest goes
};

}  // namespace tiered_mem
