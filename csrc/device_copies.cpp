// The transfer engine's part for asynchronous devices: telling copies, staging, and arrivals.
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "error.h"
#include "steady.h"
#include "transfer.h"

namespace tiered_mem {

namespace {

constexpr std::size_t kStagesPerThread = 3;  // one fills while others are fetched
constexpr std::chrono::microseconds kLookEvery{20};
constexpr std::uint64_t kBatchNbytes = 16 << 20;  // a fraction of a millisecond on any link

Direction direction_of(Link link) {
  return link == Link::hbm_to_dram ? Direction::out : Direction::in;
}

}  // namespace

// A thread's staging memory: chunks in turn, each free again when its copy has arrived.
struct TransferEngine::Stages {
  std::shared_ptr<Memory> memory;
  MarkPtr marks[kStagesPerThread];
  std::size_t next = 0;
};

std::exception_ptr TransferEngine::device_error() const {
  if (!device_failed_) return nullptr;
  const std::lock_guard lock(mutex_);
  return device_error_;
}

// --- telling ---

// The device itself keeps the order behind a transfer whose copies it knows.
bool TransferEngine::waits_on_device(const Transfer& before) const {
  return is_asynchronous() && before.issued();
}

// Behind a guess that waits for computing, demands would wait too.
bool TransferEngine::waits_for_compute(const Transfer& transfer) const {
  try {
    for (const MarkPtr& mark : transfer.after_marks)
      if (!device_->reached(mark)) return true;
  } catch (const Error&) {  // told by the first copy
  }
  return false;
}

// What of the device's work comes before the transfer's copies. Once one of them is told, the order
// among copies of a direction sees to the others.
std::vector<MarkPtr> TransferEngine::dependencies(const Transfer& transfer) {
  std::vector<MarkPtr> marks;
  if (transfer.told_any_) return marks;
  const auto add = [&](const MarkPtr& mark) {
    if (mark && !device_->reached(mark)) marks.push_back(mark);
  };
  for (const MarkPtr& mark : transfer.after_marks) add(mark);
  for (const auto& before : transfer.after)
    if (!before->ended()) add(before->mark_);
  if (transfer.fed_by && !transfer.fed_by->ended()) add(transfer.fed_by->mark_);
  return marks;
}

void TransferEngine::pump() {
  if (!is_asynchronous()) return;
  const std::lock_guard lock(mutex_);
  const bool others = issued_some_;
  pump_locked();
  issued_some_ = others;  // the caller sees what it issued
}

void TransferEngine::pump_and_announce(std::unique_lock<std::mutex>& lock) {
  pump_locked();
  if (!std::exchange(issued_some_, false) || !on_issued_) return;
  lock.unlock();
  on_issued_();
  lock.lock();
}

// One batch a direction, and what waits for something behind it. Telling may let more start.
void TransferEngine::pump_locked() {
  for (bool any = true; any;) {
    any = false;
    std::vector<Claim> ready[2], waiting[2];
    std::vector<MarkPtr> after[2];
    for (Claim claimed; claim(claimed, {Claimant::Kind::device, {}}); claimed = {}) {
      any = true;
      const auto i = static_cast<std::size_t>(direction_of(claimed.transfer->link));
      try {
        claimed.transfer->check_feeder();
      } catch (...) {
        refuse(claimed, std::current_exception());
        continue;
      }
      std::vector<MarkPtr> marks;
      try {
        marks = dependencies(*claimed.transfer);
      } catch (const Error&) {
        note_failure(std::current_exception());
        refuse(claimed, std::current_exception());
        continue;
      }
      (marks.empty() ? ready : waiting)[i].push_back(claimed);
      after[i].insert(after[i].end(), marks.begin(), marks.end());
    }
    for (const Direction direction : {Direction::out, Direction::in}) {
      const auto i = static_cast<std::size_t>(direction);
      tell_in_batches(direction, ready[i], {});
      tell_in_batches(direction, waiting[i], after[i]);
    }
  }
}

// What is computed on the first blocks needn't wait for the last.
void TransferEngine::tell_in_batches(Direction direction, const std::vector<Claim>& claims,
                                     const std::vector<MarkPtr>& after) {
  std::vector<Claim> batch;
  std::uint64_t nbytes = 0;
  for (std::size_t i = 0; i < claims.size(); ++i) {
    batch.push_back(claims[i]);
    nbytes += claims[i].nbytes;
    if (nbytes < kBatchNbytes && i + 1 < claims.size()) continue;
    tell(direction, batch, after);
    batch.clear();
    nbytes = 0;
  }
}

// A batch that the device refuses fails as a whole: it is told which copy it was by its error.
void TransferEngine::tell(Direction direction, const std::vector<Claim>& claims,
                          std::vector<MarkPtr> after) {
  std::vector<Copy> copies;
  for (const Claim& claim : claims) {
    const Transfer& transfer = *claim.transfer;
    const std::uint64_t first = claim.chunk * kChunk + claim.first;
    copies.push_back({transfer.target + first, transfer.source + first, claim.nbytes});
  }
  MarkPtr mark;
  try {
    mark = device_->copy_async(direction, copies, after);
  } catch (...) {
    for (const Claim& claim : claims) refuse(claim, std::current_exception());
    return;
  }
  for (const Claim& claim : claims)
    note_told(claim, mark, turn_ends_at(claim.transfer->link, claim.nbytes));
}

// A copy that can't be told. Whoever tells copies may hold locks that the end of a transfer takes,
// so ends are for the thread that watches arrivals.
void TransferEngine::refuse(const Claim& claim, std::exception_ptr error) {
  refused_.push_back({claim, error});
  told_some_.notify_one();
}

void TransferEngine::note_failure(std::exception_ptr error) {
  if (!device_error_) device_error_ = error;
  device_failed_ = true;
  told_some_.notify_one();
}

void TransferEngine::note_told(const Claim& claim, const MarkPtr& mark, double not_before) {
  Transfer& transfer = *claim.transfer;
  std::deque<Told>& told = told_[static_cast<std::size_t>(direction_of(transfer.link))];
  const double now = seconds_now();
  if (told.empty()) last_arrival_[static_cast<std::size_t>(direction_of(transfer.link))] = now;
  told.push_back({claim, mark, now, not_before});
  transfer.mark_ = mark;
  transfer.told_any_ = true;
  --transfer.num_untold_;
  // Who relies on a throttled link's time, or on what a thread does with the bytes, waits for them.
  const bool staged_out = !transfer.direct_ && transfer.link == Link::hbm_to_dram;
  if (transfer.all_claimed() && transfer.num_untold_ == 0 && not_before == 0 && !staged_out &&
      !transfer.error_) {
    transfer.issued_.store(true, std::memory_order_release);
    issued_some_ = true;
  }
  told_some_.notify_one();
}

// When a throttled link has carried these bytes; 0 without a throttle.
double TransferEngine::turn_ends_at(Link link, std::uint64_t nbytes) {
  Pace& pace = pace_[static_cast<std::size_t>(link)];
  if (pace.bytes_per_second <= 0) return 0;
  pace.free_at = std::max(pace.free_at, seconds_now()) + nbytes / pace.bytes_per_second;
  return pace.free_at;
}

// --- staging, by I/O threads ---

void TransferEngine::work_for_device() {
  Scratch scratch;
  Stages stages;
  std::unique_lock lock(mutex_);
  for (;;) {
    Claim mine;
    wake_.wait(lock, [&] { return closing_ || claim(mine, {}); });
    if (!mine.transfer) break;
    try {
      move_staged(mine, scratch, stages, lock);
    } catch (...) {
      if (!lock.owns_lock()) lock.lock();
      land(lock, mine, std::current_exception());
    }
    pump_and_announce(lock);
  }
  lock.unlock();
  try {
    for (const MarkPtr& mark : stages.marks) await(mark);
  } catch (const Error&) {
    new std::shared_ptr<Memory>(stages.memory);  // never freed: the device may still write there
  }
}

// A chunk by way of memory that the device reaches. Called with the lock; gives it up meanwhile.
void TransferEngine::move_staged(const Claim& claim, Scratch& scratch, Stages& stages,
                                 std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Transfer> transfer = claim.transfer;
  const std::uint64_t first = claim.chunk * kChunk;
  if (transfer->into_dram && transfer->extent) {  // host memory: no device has a part in it
    lock.unlock();
    read_chunk(*transfer->extent, claim.chunk, transfer->target + first, scratch);
    lock.lock();
    wait_for_turn(transfer->link, claim.nbytes, lock);
    land(lock, claim, nullptr);
    return;
  }
  const std::size_t turn = stages.next++ % kStagesPerThread;
  const bool out = transfer->link == Link::hbm_to_dram;
  const std::vector<MarkPtr> before = out ? dependencies(*transfer) : std::vector<MarkPtr>{};
  lock.unlock();
  if (!stages.memory) stages.memory = device_->allocate_staging(kStagesPerThread * kChunk);
  std::byte* const stage = stages.memory->data() + turn * kChunk;
  await(stages.marks[turn]);

  if (out) {
    const std::uint64_t nbytes = claim.nbytes;
    stages.marks[turn] =
        device_->copy_async(Direction::out, {{stage, transfer->source + first, nbytes}}, before);
    await(stages.marks[turn]);
    std::copy_n(stage, nbytes, transfer->target + first);
    lock.lock();
    wait_for_turn(transfer->link, nbytes, lock);
    land(lock, claim, nullptr);
    return;
  }
  std::uint64_t nbytes = claim.nbytes;
  if (transfer->extent) {
    read_chunk(*transfer->extent, claim.chunk, stage, scratch);
    nbytes = transfer->extent->chunks[claim.chunk].raw_nbytes;
  } else {
    transfer->check_feeder();
    std::copy_n(transfer->source + first, nbytes, stage);
  }
  lock.lock();
  // Under the lock, so that a transfer's last mark is that of its last copy.
  stages.marks[turn] = device_->copy_async(
      Direction::in, {{transfer->target + first, stage, nbytes}}, dependencies(*transfer));
  note_told(claim, stages.marks[turn], turn_ends_at(transfer->link, claim.nbytes));
}

// Waits for a point in the device's work, or its failure.
void TransferEngine::await(const MarkPtr& mark) {
  while (mark && !device_->reached(mark)) {
    if (device_failed_) throw TransferError("the device failed before these bytes arrived");
    std::this_thread::sleep_for(kLookEvery);
  }
}

// --- arrivals ---

void TransferEngine::watch_arrivals() {
  prctl(PR_SET_TIMERSLACK, 1000UL);  // ns: sleeps are as short as they are meant to be
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto has_work = [this] {
      return !told_[0].empty() || !told_[1].empty() || !refused_.empty() || failure_is_new();
    };
    told_some_.wait(lock, [&] { return closing_ || has_work(); });
    if (!has_work()) return;
    if (failure_is_new()) end_all(lock, false);
    if (land_refused(lock) | land_arrived(lock)) {
      pump_and_announce(lock);
      continue;
    }
    check_progress(lock);
    lock.unlock();
    std::this_thread::sleep_for(kLookEvery);
    lock.lock();
  }
}

bool TransferEngine::land_refused(std::unique_lock<std::mutex>& lock) {
  const bool any = !refused_.empty();
  while (!refused_.empty()) {
    const auto [claim, error] = refused_.front();
    refused_.pop_front();
    land(lock, claim, error);
  }
  return any;
}

bool TransferEngine::land_arrived(std::unique_lock<std::mutex>& lock) {
  bool any = false;
  try {
    for (std::size_t i = 0; i < 2; ++i)
      while (!told_[i].empty() && (stopping_ || told_[i].front().not_before <= seconds_now()) &&
             device_->reached(told_[i].front().mark)) {
        const Claim arrived = told_[i].front().claim;
        told_[i].pop_front();
        last_arrival_[i] = seconds_now();
        any = true;
        land(lock, arrived, nullptr);
      }
  } catch (const Error&) {
    note_failure(std::current_exception());
    end_all(lock, false);
  }
  return any;
}

// The watchdog.
void TransferEngine::check_progress(std::unique_lock<std::mutex>& lock) {
  const double now = seconds_now();
  for (std::size_t i = 0; i < 2; ++i) {
    if (told_[i].empty()) continue;
    const Told& first = told_[i].front();
    const double since = std::max({first.at, last_arrival_[i], first.not_before});
    if (now - since < watchdog_seconds_) continue;
    note_failure(std::make_exception_ptr(TransferError(
        std::string("a copy of ") + std::to_string(first.claim.nbytes) + " bytes (" +
        link_name(first.claim.transfer->link) + ") hasn't arrived for " +
        std::to_string(static_cast<long>(watchdog_seconds_)) +
        " s: the device or its driver hangs, or other work holds it; the runtime is closed, start "
        "the process anew")));
    end_all(lock, true);
    return;
  }
}

void TransferEngine::fail_device(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  note_failure(error);
}

// Ends all transfers. What a stuck device may still write to is never freed.
void TransferEngine::end_all(std::unique_lock<std::mutex>& lock, bool stuck) {
  ended_all_ = true;
  const std::exception_ptr error = device_error_;
  std::vector<Claim> lost;
  for (std::deque<Told>& told : told_) {
    for (const Told& copy : told) lost.push_back(copy.claim);
    told.clear();
  }
  for (const Claim& claim : lost) {
    if (stuck) new std::vector<std::shared_ptr<const void>>(claim.transfer->keep_alive);
    land(lock, claim, error);
  }
  drop_queued(lock, error);
}

}  // namespace tiered_mem
