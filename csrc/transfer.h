// The transfer engine: I/O threads that move blocks in chunks of at most 1 MiB.
//
// Demand overtakes prefetch at the next piece of a chunk. Prefetch moves in small pieces, a few at
// a time, and only while no demand is in flight on its link, so a wrong guess costs a demand at
// most the pieces that are under way. The threads know nothing of Python, policies or residency.
//
// Copies of an asynchronous device are only told to it, whole batches at a time
// (device_copies.cpp): what the device can reach by whoever asks for them, the rest by the I/O
// threads through staging memory. One more thread sees them arrive. What comes after a copy on the
// device needn't wait for that: a ticket is `issued` once all its copies have been told.
//
// An engine over virtual links has no threads and moves no bytes: its chunks take the time that
// such links would need, on a clock that goes on when its owner says so. What is queued, claimed,
// overtaken, raised and cancelled is decided by the same code.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "direct_io.h"

namespace tiered_mem {

constexpr std::uint64_t kChunk = kChunkNbytes;

enum class Priority : std::uint8_t { demand, prefetch };
enum class Link : std::uint8_t { nvme_to_hbm, dram_to_hbm, hbm_to_dram };
constexpr std::size_t kNumLinks = 3;
const char* link_name(Link link);

/// A virtual link: how many bytes a second it carries, and the seconds from the last byte's start
/// until they have arrived. Its pieces follow one another without waiting for arrivals.
struct LinkSpeed {
  double bytes_per_second = 0;
  double latency = 0;
};
using LinkSpeeds = std::array<LinkSpeed, kNumLinks>;

/// One block on its way: the ticket. Holds its buffers until it is done.
class Transfer : public std::enable_shared_from_this<Transfer> {
 public:
  enum class Status : std::uint8_t { queued, done, failed, cancelled };

  Link link;
  std::uint64_t nbytes = 0;
  bool into_dram = false;
  bool from_store = false;  // by way of DRAM, too
  std::byte* target = nullptr;
  /// Source: a block of a file, or other memory.
  std::shared_ptr<const Extent> extent;
  const std::byte* source = nullptr;
  /// Transfers that must have ended first, since they still read the target.
  std::vector<std::shared_ptr<Transfer>> after;
  /// The transfer that fills the source: it must have ended well.
  std::shared_ptr<Transfer> fed_by;
  /// What of the device's work must have been done first, since it still reads the target.
  std::vector<MarkPtr> after_marks;
  /// Order among prefetches: earlier events first, likelier blocks first.
  std::uint64_t due = 0;
  double probability = 0;
  std::vector<std::shared_ptr<const void>> keep_alive;
  /// Called without the engine's lock when the transfer has ended, but for an end that `submit`
  /// or `cancel` report by their return value.
  std::function<void(Transfer&)> on_end;

  Status status() const { return status_.load(std::memory_order_acquire); }
  bool ended() const { return status() != Status::queued; }
  /// Whether all its copies have been told to the device, the last of them with `mark`.
  bool issued() const { return issued_.load(std::memory_order_acquire); }
  const MarkPtr& mark() const { return mark_; }
  /// The error of a failed transfer.
  std::exception_ptr error() const { return error_; }
  /// Bytes that were moved, once it has ended.
  std::uint64_t nbytes_moved() const { return nbytes_moved_; }

 private:
  friend class TransferEngine;
  void check_feeder() const;
  std::uint32_t num_chunks() const;
  bool all_claimed() const { return next_chunk_ >= num_chunks(); }
  std::byte* host_side() const {
    return link == Link::hbm_to_dram ? target : const_cast<std::byte*>(source);
  }
  std::uint64_t chunk_nbytes(std::uint32_t chunk) const;  // as the link sees them

  Priority priority_ = Priority::demand;
  std::uint32_t next_chunk_ = 0;     // the first that isn't wholly claimed
  std::uint64_t next_byte_ = 0;      // of that chunk: the first that no thread has claimed
  std::uint32_t num_in_flight_ = 0;  // pieces claimed and not finished
  std::uint32_t num_untold_ = 0;     // of these, not told to the device
  bool direct_ = false;              // copies that the device does without staging
  bool told_any_ = false;            // the device knows what comes before the copies
  MarkPtr mark_;
  std::vector<std::uint64_t> landed_;  // bytes, by chunk, of chunks that came in pieces
  std::uint64_t nbytes_moved_ = 0;
  bool abandoned_ = false;  // cancelled or failed: claim no further chunk
  std::exception_ptr error_;
  std::atomic<bool> issued_{false};
  std::atomic<Status> status_{Status::queued};
};

/// How prefetch moves: at most so many pieces of so many bytes (pages) at a time on a link. Small
/// ones let demand through soon; several hide the latency that each of them has.
struct PrefetchPace {
  std::uint64_t piece_nbytes = 128 << 10;
  std::size_t num_pieces = 4;
};

/// For devices: a few pieces of what keeps their links busy between two looks at what arrived.
constexpr PrefetchPace kDevicePace{1 << 20, 4};

class TransferEngine {
 public:
  /// `device` copies between memories and outlives the engine. A device that moves nothing for
  /// `watchdog_seconds` though it should has failed.
  TransferEngine(std::size_t num_threads, Device& device, PrefetchPace pace = {},
                 double watchdog_seconds = 60);
  /// An engine on a virtual clock. Throws ConfigError unless every link has a speed.
  explicit TransferEngine(const LinkSpeeds& speeds, PrefetchPace pace = {});
  /// Cancels what hasn't started and waits for the chunks in flight.
  ~TransferEngine();
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  /// False if the engine was stopped, or its device failed: the transfer has ended. Call `pump`
  /// when all that belongs together has been submitted.
  bool submit(const std::shared_ptr<Transfer>& transfer, Priority priority);
  /// Tells the device all copies that may start now.
  void pump();
  /// Makes a prefetch a demand, a cancelled one that still has chunks in flight included. False
  /// if it has ended.
  bool raise(const std::shared_ptr<Transfer>& transfer);
  /// Claims no further chunk. True if the transfer ended by it; else it ends (as cancelled, or
  /// as done if all its chunks were claimed) with its last chunk in flight.
  bool cancel(const std::shared_ptr<Transfer>& transfer);
  /// Cancels everything, waits until nothing is queued or in flight, and ends the threads. Later
  /// submits end as cancelled. For one thread at a time.
  void stop();

  /// Bytes per second that a link may carry, 0 for no limit: slows a link down to study it.
  /// Chunks that wait for their turn at the old rate go on at once.
  void throttle(Link link, double bytes_per_second);

  /// Why the device can't be used any more; null as long as it can. All its transfers have ended
  /// then.
  std::exception_ptr device_error() const;
  /// Is told, by a thread without any lock, that tickets became `issued` by another thread's doing
  /// than a call of `pump`. Set before the first `submit`.
  void set_on_issued(std::function<void()> on_issued) { on_issued_ = std::move(on_issued); }
  /// What a call of the device threw elsewhere: it can't be used any more.
  void fail_device(std::exception_ptr error);

  bool is_virtual() const { return device_ == nullptr; }
  /// Seconds on this engine's clock.
  double now() const;
  /// Virtual: goes on to the next moment at which a link gets free or a chunk arrives. False if
  /// there is none.
  bool step() { return step_until(kForever); }
  /// Virtual: lets so many seconds pass.
  void advance(double seconds);

  /// Bytes of all chunks that were moved, by link, those of cancelled transfers included.
  std::uint64_t nbytes_moved(Link link) const;

 private:
  using Queue = std::deque<std::shared_ptr<Transfer>>;
  struct Claim {
    std::shared_ptr<Transfer> transfer;
    std::uint32_t chunk = 0;
    std::uint64_t first = 0;   // byte of the chunk
    std::uint64_t nbytes = 0;  // as the link sees them
    bool whole() const { return nbytes == transfer->chunk_nbytes(chunk); }
  };

  static constexpr double kForever = 1e300;

  // Who claims: an I/O thread, the device, or one virtual link.
  struct Claimant {
    enum class Kind { thread, device, link } kind = Kind::thread;
    Link link{};
    bool takes(const Transfer& transfer) const {
      return kind == Kind::link ? transfer.link == link
                                : transfer.direct_ == (kind == Kind::device);
    }
  };

  void work();
  void work_for_device();
  bool claim(Claim& claim, const Claimant& claimant);
  bool claim_from(Queue& queue, Claim& claim, const Claimant& claimant);
  void land(std::unique_lock<std::mutex>& lock, const Claim& claim, std::exception_ptr error);
  bool step_until(double limit);
  void start_virtual();
  bool may_start(const Transfer& transfer) const;
  std::size_t& num_in_flight(const Transfer& transfer);
  void enqueue(const std::shared_ptr<Transfer>& transfer);
  bool raise_locked(const std::shared_ptr<Transfer>& transfer);
  void move(const Claim& claim, Scratch& scratch);
  void check_if_last(const Claim& claim, std::unique_lock<std::mutex>& lock);
  void wait_for_turn(Link link, std::uint64_t nbytes, std::unique_lock<std::mutex>& lock);
  void finish(std::unique_lock<std::mutex>& lock, const std::shared_ptr<Transfer>& transfer);
  void end(Transfer& transfer);
  void drop_queued(std::unique_lock<std::mutex>& lock, std::exception_ptr error);

  // Copies of an asynchronous device.
  struct Stages;
  bool is_asynchronous() const { return device_ != nullptr && device_->asynchronous(); }
  bool waits_on_device(const Transfer& before) const;
  bool waits_for_compute(const Transfer& transfer) const;
  std::vector<MarkPtr> dependencies(const Transfer& transfer);
  void pump_locked();
  void tell(Direction direction, const std::vector<Claim>& claims, std::vector<MarkPtr> after);
  void tell_in_batches(Direction direction, const std::vector<Claim>& claims,
                       const std::vector<MarkPtr>& after);
  void refuse(const Claim& claim, std::exception_ptr error);
  void note_failure(std::exception_ptr error);
  void note_told(const Claim& claim, const MarkPtr& mark, double not_before);
  double turn_ends_at(Link link, std::uint64_t nbytes);
  void move_staged(const Claim& claim, Scratch& scratch, Stages& stages,
                   std::unique_lock<std::mutex>& lock);
  void await(const MarkPtr& mark);
  void pump_and_announce(std::unique_lock<std::mutex>& lock);
  void watch_arrivals();
  bool land_refused(std::unique_lock<std::mutex>& lock);
  bool land_arrived(std::unique_lock<std::mutex>& lock);
  void check_progress(std::unique_lock<std::mutex>& lock);
  bool failure_is_new() const { return device_error_ && !ended_all_; }
  void end_all(std::unique_lock<std::mutex>& lock, bool stuck);

  Device* device_;  // null: virtual
  PrefetchPace prefetch_pace_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;                  // work came, a dependency ended, or stop
  std::condition_variable quiet_;                 // a transfer ended
  std::condition_variable pace_changed_;          // a throttle was changed, or stop
  Queue demand_, prefetch_;                       // those with chunks left to claim, oldest first
  std::size_t num_in_flight_[kNumLinks][2] = {};  // pieces by link and priority
  std::size_t num_open_ = 0;                      // submitted and not ended
  bool stopping_ = false;
  bool closing_ = false;
  struct Pace {
    double bytes_per_second = 0;
    double free_at = 0;  // seconds on the steady clock
  };
  Pace pace_[kNumLinks];
  std::uint64_t nbytes_moved_[kNumLinks] = {};
  std::vector<std::thread> threads_;

  // Copies that an asynchronous device was told, by direction, in their order.
  struct Told {
    Claim claim;
    MarkPtr mark;
    double at;
    double not_before;  // a throttled link's
  };
  std::deque<Told> told_[2];
  std::deque<std::pair<Claim, std::exception_ptr>> refused_;
  bool ended_all_ = false;  // after a failure of the device
  double last_arrival_[2] = {};
  std::condition_variable told_some_;
  std::function<void()> on_issued_;
  bool issued_some_ = false;
  double watchdog_seconds_ = 0;
  std::exception_ptr device_error_;
  std::atomic<bool> device_failed_{false};

  // The virtual clock.
  struct Landing {
    double at;
    std::uint64_t number;  // chunks that arrive together do so in the order they started
    Claim claim;
    bool operator>(const Landing& other) const {
      return at != other.at ? at > other.at : number > other.number;
    }
  };
  LinkSpeeds speeds_{};
  std::array<double, kNumLinks> free_at_{};
  std::priority_queue<Landing, std::vector<Landing>, std::greater<>> landings_;
  std::uint64_t num_started_ = 0;
  double now_ = 0;
};

}  // namespace tiered_mem
