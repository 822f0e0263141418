#include "transfer.h"

#include <algorithm>
#include <chrono>

#include "error.h"
#include "steady.h"

namespace tiered_mem {

const char* link_name(Link link) {
  static const char* const names[] = {"nvme_to_hbm", "dram_to_hbm", "hbm_to_dram"};
  return names[static_cast<std::size_t>(link)];
}

// Throws why the source wasn't filled.
void Transfer::check_feeder() const {
  if (!fed_by || !fed_by->ended() || fed_by->status() == Status::done) return;
  if (fed_by->error()) std::rethrow_exception(fed_by->error());
  throw Error("the block was to be copied from a copy that didn't arrive");
}

std::uint32_t Transfer::num_chunks() const {
  if (extent) return static_cast<std::uint32_t>(extent->chunks.size());
  if (direct_) return 1;
  return static_cast<std::uint32_t>((nbytes + kChunk - 1) / kChunk);
}

std::uint64_t Transfer::chunk_nbytes(std::uint32_t chunk) const {
  if (extent) return extent->chunks[chunk].stored_nbytes;
  return direct_ ? nbytes : std::min(kChunk, nbytes - chunk * kChunk);
}

TransferEngine::TransferEngine(std::size_t num_threads, Device& device, PrefetchPace pace,
                               double watchdog_seconds)
    : device_(&device), prefetch_pace_(pace), watchdog_seconds_(watchdog_seconds) {
  // A demand finds a thread that isn't busy with guesses.
  if (!is_asynchronous())
    prefetch_pace_.num_pieces =
        std::clamp<std::size_t>(pace.num_pieces, 1, std::max<std::size_t>(num_threads, 2) - 1);

  for (std::size_t i = 0; i < num_threads; ++i)
    threads_.emplace_back([this] { is_asynchronous() ? work_for_device() : work(); });
  if (is_asynchronous()) threads_.emplace_back([this] { watch_arrivals(); });
}

TransferEngine::~TransferEngine() { stop(); }

// Demands are served in the order they came, prefetches by due time and probability.
void TransferEngine::enqueue(const std::shared_ptr<Transfer>& transfer) {
  if (transfer->priority_ == Priority::demand) {
    // What a demand waits for is a demand.
    for (const auto& before : transfer->after) raise_locked(before);
    if (transfer->fed_by) raise_locked(transfer->fed_by);
    demand_.push_back(transfer);
  } else {
    const auto sooner = [](const auto& a, const auto& b) {
      return a->due != b->due ? a->due < b->due : a->probability > b->probability;
    };
    prefetch_.insert(std::upper_bound(prefetch_.begin(), prefetch_.end(), transfer, sooner),
                     transfer);
  }
  wake_.notify_all();
}

bool TransferEngine::submit(const std::shared_ptr<Transfer>& transfer, Priority priority) {
  std::lock_guard lock(mutex_);
  transfer->priority_ = priority;
  if (stopping_ || device_error_) {
    transfer->abandoned_ = true;
    transfer->error_ = device_error_;
    end(*transfer);
    return false;
  }
  transfer->direct_ = is_asynchronous() && !transfer->extent &&
                      device_->reaches(transfer->host_side(), transfer->nbytes);
  ++num_open_;
  enqueue(transfer);
  return true;
}

bool TransferEngine::raise(const std::shared_ptr<Transfer>& transfer) {
  std::lock_guard lock(mutex_);
  return raise_locked(transfer);
}

bool TransferEngine::raise_locked(const std::shared_ptr<Transfer>& transfer) {
  if (transfer->ended() || transfer->error_ || stopping_) return false;
  if (transfer->priority_ == Priority::demand && !transfer->abandoned_) return true;
  const auto found = std::find(prefetch_.begin(), prefetch_.end(), transfer);
  if (found != prefetch_.end()) prefetch_.erase(found);
  num_in_flight(*transfer) -= transfer->num_in_flight_;
  transfer->priority_ = Priority::demand;
  num_in_flight(*transfer) += transfer->num_in_flight_;
  transfer->abandoned_ = false;
  if (!transfer->all_claimed()) enqueue(transfer);
  return true;
}

bool TransferEngine::cancel(const std::shared_ptr<Transfer>& transfer) {
  std::lock_guard lock(mutex_);
  if (transfer->ended()) return false;
  Queue& queue = transfer->priority_ == Priority::demand ? demand_ : prefetch_;
  const auto found = std::find(queue.begin(), queue.end(), transfer);
  if (found == queue.end()) return false;  // too late: its last piece is under way
  queue.erase(found);
  transfer->abandoned_ = true;
  if (transfer->num_in_flight_ > 0) return false;
  end(*transfer);
  --num_open_;
  quiet_.notify_all();
  wake_.notify_all();
  return true;
}

void TransferEngine::stop() {
  std::unique_lock lock(mutex_);
  stopping_ = true;
  pace_changed_.notify_all();
  drop_queued(lock, nullptr);
  for (; !landings_.empty(); landings_.pop()) land(lock, landings_.top().claim, nullptr);
  quiet_.wait(lock, [this] { return num_open_ == 0; });
  closing_ = true;
  lock.unlock();
  wake_.notify_all();
  told_some_.notify_all();
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
}

// Ends all that has no piece in flight; the rest ends with its last piece.
void TransferEngine::drop_queued(std::unique_lock<std::mutex>& lock, std::exception_ptr error) {
  for (Queue* queue : {&demand_, &prefetch_})
    while (!queue->empty()) {
      const auto transfer = queue->front();
      queue->pop_front();
      transfer->abandoned_ = true;
      if (error) transfer->error_ = error;
      if (transfer->num_in_flight_ == 0) finish(lock, transfer);
    }
}

void TransferEngine::throttle(Link link, double bytes_per_second) {
  std::lock_guard lock(mutex_);
  pace_[static_cast<std::size_t>(link)] = {bytes_per_second, 0};
  pace_changed_.notify_all();
  for (std::deque<Told>& told : told_)
    for (Told& copy : told)
      if (copy.claim.transfer->link == link) copy.not_before = 0;
}

std::uint64_t TransferEngine::nbytes_moved(Link link) const {
  std::lock_guard lock(mutex_);
  return nbytes_moved_[static_cast<std::size_t>(link)];
}

std::size_t& TransferEngine::num_in_flight(const Transfer& transfer) {
  return num_in_flight_[static_cast<std::size_t>(transfer.link)]
                       [static_cast<std::size_t>(transfer.priority_)];
}

// A prefetch starts only on a link without demands, and few pieces at a time, so that a demand
// never waits for more than these.
bool TransferEngine::may_start(const Transfer& transfer) const {
  for (const auto& before : transfer.after)
    if (!before->ended() && !waits_on_device(*before)) return false;
  // A thread that stages copies from the source itself.
  if (const auto& feeder = transfer.fed_by; feeder && !feeder->ended())
    if (!transfer.direct_ || !waits_on_device(*feeder)) return false;
  if (transfer.priority_ == Priority::demand) return true;
  if (!transfer.after_marks.empty() && waits_for_compute(transfer)) return false;
  const auto& busy = num_in_flight_[static_cast<std::size_t>(transfer.link)];
  return busy[0] == 0 && busy[1] < prefetch_pace_.num_pieces;
}

// The next chunk that the claimant may move.
bool TransferEngine::claim(Claim& claim, const Claimant& claimant) {
  return claim_from(demand_, claim, claimant) || claim_from(prefetch_, claim, claimant);
}

bool TransferEngine::claim_from(Queue& queue, Claim& claim, const Claimant& claimant) {
  for (auto it = queue.begin(); it != queue.end(); ++it) {
    const std::shared_ptr<Transfer> transfer = *it;
    if (!claimant.takes(*transfer) || !may_start(*transfer)) continue;
    claim = {transfer, transfer->next_chunk_, transfer->next_byte_, 0};
    const std::uint64_t left = transfer->chunk_nbytes(claim.chunk) - claim.first;
    // What is compressed is decoded as a whole, and what is staged has its checksum compared there.
    const bool divisible = is_asynchronous()
                               ? transfer->direct_
                               : !transfer->extent || transfer->extent->codec == Codec::none;
    const bool in_pieces = transfer->priority_ == Priority::prefetch && divisible;
    claim.nbytes = in_pieces ? std::min(left, prefetch_pace_.piece_nbytes) : left;
    transfer->next_byte_ += claim.nbytes;
    if (claim.nbytes == left) {
      ++transfer->next_chunk_;
      transfer->next_byte_ = 0;
    }
    ++transfer->num_in_flight_;
    ++transfer->num_untold_;
    ++num_in_flight(*transfer);
    if (transfer->all_claimed()) queue.erase(it);
    return true;
  }
  return false;
}

void TransferEngine::work() {
  Scratch scratch;
  std::unique_lock lock(mutex_);
  for (;;) {
    Claim mine;
    wake_.wait(lock, [&] { return closing_ || claim(mine, {}); });
    if (!mine.transfer) return;
    std::exception_ptr error;
    lock.unlock();
    try {
      move(mine, scratch);
      lock.lock();
      check_if_last(mine, lock);
    } catch (...) {
      error = std::current_exception();
      if (!lock.owns_lock()) lock.lock();
    }
    wait_for_turn(mine.transfer->link, mine.nbytes, lock);
    land(lock, mine, error);
  }
}

// A claimed piece has arrived, or failed to.
void TransferEngine::land(std::unique_lock<std::mutex>& lock, const Claim& claim,
                          std::exception_ptr error) {
  Transfer& transfer = *claim.transfer;
  nbytes_moved_[static_cast<std::size_t>(transfer.link)] += claim.nbytes;
  transfer.nbytes_moved_ += claim.nbytes;
  --transfer.num_in_flight_;
  --num_in_flight(transfer);
  // A cancelled transfer's error counts too: the transfer may be raised again.
  if (error && !transfer.error_) {
    transfer.error_ = error;
    transfer.abandoned_ = true;
    Queue& queue = transfer.priority_ == Priority::demand ? demand_ : prefetch_;
    queue.erase(std::remove(queue.begin(), queue.end(), claim.transfer), queue.end());
  }
  if (transfer.num_in_flight_ == 0 && (transfer.abandoned_ || transfer.all_claimed()))
    finish(lock, claim.transfer);
  wake_.notify_all();
}

// --- the virtual clock ---

TransferEngine::TransferEngine(const LinkSpeeds& speeds, PrefetchPace pace)
    : device_(nullptr), prefetch_pace_(pace), speeds_(speeds) {
  for (const LinkSpeed& speed : speeds)
    if (!(speed.bytes_per_second > 0) || !(speed.latency >= 0))
      throw ConfigError("a link needs a speed above 0 bytes per second and a latency from 0 on");
}

double TransferEngine::now() const { return is_virtual() ? now_ : seconds_now(); }

// Every link that is free takes its next piece.
void TransferEngine::start_virtual() {
  for (std::size_t i = 0; i < kNumLinks; ++i) {
    const Link link = static_cast<Link>(i);
    Claim claimed;
    if (free_at_[i] > now_ || !claim(claimed, {Claimant::Kind::link, link})) continue;
    free_at_[i] = now_ + static_cast<double>(claimed.nbytes) / speeds_[i].bytes_per_second;
    landings_.push({free_at_[i] + speeds_[i].latency, num_started_++, std::move(claimed)});
  }
}

bool TransferEngine::step_until(double limit) {
  std::unique_lock lock(mutex_);
  start_virtual();
  double next = landings_.empty() ? kForever : landings_.top().at;
  for (double at : free_at_)
    if (at > now_) next = std::min(next, at);
  if (next >= kForever || next > limit) return false;
  now_ = next;
  while (!landings_.empty() && landings_.top().at <= now_) {
    const Claim arrived = landings_.top().claim;
    landings_.pop();
    land(lock, arrived, nullptr);
  }
  start_virtual();
  return true;
}

void TransferEngine::advance(double seconds) {
  if (!(seconds >= 0)) throw ConfigError("a clock goes forward: give seconds from 0 on");
  const double until = now_ + seconds;
  while (step_until(until)) {
  }
  now_ = until;
}

// For a device that copies at once.
void TransferEngine::move(const Claim& claim, Scratch& scratch) {
  Transfer& transfer = *claim.transfer;
  if (transfer.extent) {
    std::byte* const target = transfer.target + claim.chunk * kChunk;
    if (claim.whole())
      read_chunk(*transfer.extent, claim.chunk, target, scratch);
    else
      read_piece(*transfer.extent, claim.chunk, claim.first, claim.nbytes, target);
    return;
  }
  transfer.check_feeder();
  const std::uint64_t first = claim.chunk * kChunk + claim.first;
  const Direction direction = transfer.link == Link::hbm_to_dram ? Direction::out : Direction::in;
  device_->wait(device_->copy_async(
      direction, {{transfer.target + first, transfer.source + first, claim.nbytes}}, {}));
}

// Whoever brings the last piece of a chunk of a file compares its checksum. Gives the lock up for
// that. Throws ChecksumMismatch.
void TransferEngine::check_if_last(const Claim& claim, std::unique_lock<std::mutex>& lock) {
  Transfer& transfer = *claim.transfer;
  if (!transfer.extent || claim.whole()) return;
  transfer.landed_.resize(transfer.num_chunks());
  std::uint64_t& landed = transfer.landed_[claim.chunk];
  landed += claim.nbytes;
  if (landed < transfer.chunk_nbytes(claim.chunk)) return;
  lock.unlock();
  check_chunk(*transfer.extent, claim.chunk, transfer.target + claim.chunk * kChunk);
  lock.lock();
}

// A throttled link carries one chunk after the other, each as long as its bytes take.
void TransferEngine::wait_for_turn(Link link, std::uint64_t nbytes,
                                   std::unique_lock<std::mutex>& lock) {
  Pace& pace = pace_[static_cast<std::size_t>(link)];
  const double rate = pace.bytes_per_second;
  if (rate <= 0) return;
  pace.free_at = std::max(pace.free_at, seconds_now()) + nbytes / rate;
  const double until = pace.free_at;
  while (!stopping_ && pace.bytes_per_second == rate) {
    const double left = until - seconds_now();
    if (left <= 0) return;
    pace_changed_.wait_for(lock, std::chrono::duration<double>(std::min(left, 1.0)));
  }
}

// Called with the lock; gives it up for `on_end` and takes it again.
void TransferEngine::finish(std::unique_lock<std::mutex>& lock,
                            const std::shared_ptr<Transfer>& transfer) {
  const auto on_end = std::move(transfer->on_end);
  end(*transfer);
  lock.unlock();
  if (on_end) on_end(*transfer);
  lock.lock();
  --num_open_;
  wake_.notify_all();
  quiet_.notify_all();
}

void TransferEngine::end(Transfer& transfer) {
  transfer.after.clear();
  transfer.after_marks.clear();
  transfer.fed_by.reset();
  transfer.keep_alive.clear();
  transfer.on_end = nullptr;
  transfer.status_.store(transfer.error_       ? Transfer::Status::failed
                         : transfer.abandoned_ ? Transfer::Status::cancelled
                                               : Transfer::Status::done,
                         std::memory_order_release);
}

}  // namespace tiered_mem
