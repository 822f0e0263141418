// Memory that the device knows, and copies.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

#include "machine.h"

namespace cuda_double {

namespace {

constexpr std::uint64_t kPage = 4096;
/// Device memory is aligned as little as torch's may be.
constexpr std::uint64_t kOffset = 512;
/// Freed memory stays mapped up to so many bytes, so that a late access finds poison.
constexpr std::uint64_t kMaxFreed = 64 << 20;

std::uint64_t mapped_nbytes(std::uint64_t nbytes) {
  return (nbytes + kOffset + kPage - 1) / kPage * kPage;
}

bool is_mapped(std::byte* data, std::uint64_t nbytes) {
  constexpr std::uint64_t kAtOnce = 1 << 16;  // pages
  std::vector<unsigned char> resident(kAtOnce);
  const auto end = reinterpret_cast<std::uintptr_t>(data) + nbytes;
  for (auto at = reinterpret_cast<std::uintptr_t>(data) / kPage * kPage; at < end;
       at += kAtOnce * kPage)
    if (mincore(reinterpret_cast<void*>(at), std::min(end - at, kAtOnce * kPage),
                resident.data()) != 0)
      return false;
  return true;
}

std::byte* reach(const RangePtr& range, const std::byte* data) {
  return range ? range->alias + (data - range->data) : const_cast<std::byte*>(data);
}

bool holds(const Range& range, const std::byte* data, std::uint64_t nbytes) {
  return data >= range.data && nbytes <= range.nbytes &&
         static_cast<std::uint64_t>(data - range.data) <= range.nbytes - nbytes;
}

}  // namespace

CUresult Machine::allocate(Kind kind, std::uint64_t nbytes, std::byte** data) {
  const Lock lock(mutex_);
  if (nbytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const bool on_device = kind == Kind::device;
  const char* const limit = on_device ? "memory" : "host_memory";
  std::uint64_t& used = on_device ? device_nbytes_ : host_nbytes_;
  if (used + nbytes > static_cast<std::uint64_t>(settings_.at(limit)))
    return CUDA_ERROR_OUT_OF_MEMORY;
  const std::uint64_t mapped = mapped_nbytes(nbytes);
  const int file = memfd_create("cuda_double", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(mapped)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
  const auto map = [&](int access) {
    return static_cast<std::byte*>(mmap(nullptr, mapped, access, MAP_SHARED, file, 0));
  };
  // A guard keeps the host out of device memory, as the bus does; only the double has another way.
  const bool guarded = on_device && settings_.at("guard");
  std::byte* const base = map(guarded ? PROT_NONE : PROT_READ | PROT_WRITE);
  std::byte* const alias = guarded ? map(PROT_READ | PROT_WRITE) : base;
  close(file);
  if (base == MAP_FAILED || alias == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const std::uint64_t offset = on_device ? kOffset : 0;
  std::memset(alias, kFresh, mapped);
  *data = base + offset;
  ranges_[*data] = std::make_shared<Range>(Range{kind, *data, nbytes, alias + offset});
  used += nbytes;
  ++counts_[on_device ? "live_allocations" : "live_host_allocations"];
  return CUDA_SUCCESS;
}

CUresult Machine::add_registered(std::byte* data, std::uint64_t nbytes) {
  const Lock lock(mutex_);
  if (nbytes == 0 || !is_mapped(data, nbytes)) return CUDA_ERROR_INVALID_VALUE;
  if (overlaps(data, nbytes)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  ranges_[data] = std::make_shared<Range>(Range{Kind::registered, data, nbytes, data});
  counts_["registered_nbytes"] += static_cast<std::int64_t>(nbytes);
  ++counts_["live_registrations"];
  return CUDA_SUCCESS;
}

CUresult Machine::free(Kind kind, std::byte* data, bool waits) {
  Lock lock(mutex_);
  const auto found = ranges_.find(data);
  if (found == ranges_.end() || found->second->kind != kind)
    return kind == Kind::registered ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED
                                    : CUDA_ERROR_INVALID_VALUE;
  const RangePtr range = found->second;
  if (range->num_pending) ++counts_["freed_in_use"];
  // The driver waits for the whole device, and for ever if that hangs.
  if (waits) changed_.wait(lock, [&] { return range->num_pending == 0 && num_hung_ == 0; });
  range->live = false;
  ranges_.erase(data);
  known_.erase(std::remove_if(known_.begin(), known_.end(),
                              [&](const Known& known) {
                                return known.access.data < range->data + range->nbytes &&
                                       range->data < known.access.data + known.access.nbytes;
                              }),
               known_.end());
  if (kind == Kind::registered) {
    counts_["registered_nbytes"] -= static_cast<std::int64_t>(range->nbytes);
    --counts_["live_registrations"];
    return CUDA_SUCCESS;
  }
  const bool on_device = kind == Kind::device;
  (on_device ? device_nbytes_ : host_nbytes_) -= range->nbytes;
  --counts_[on_device ? "live_allocations" : "live_host_allocations"];
  std::memset(range->alias, kFreed, range->nbytes);
  freed_.push_back(range);
  freed_nbytes_ += range->nbytes;
  for (; freed_nbytes_ > kMaxFreed && freed_.size() > 1; freed_.pop_front()) {
    freed_nbytes_ -= freed_.front()->nbytes;
    unmap(*freed_.front());
  }
  return CUDA_SUCCESS;
}

void Machine::unmap(const Range& range) {
  const std::uint64_t offset = range.kind == Kind::device ? kOffset : 0;
  munmap(range.data - offset, mapped_nbytes(range.nbytes));
  if (range.alias != range.data) munmap(range.alias - offset, mapped_nbytes(range.nbytes));
}

RangePtr Machine::find(const std::byte* data) const {
  auto next = ranges_.upper_bound(data);
  if (next == ranges_.begin()) return nullptr;
  const RangePtr range = std::prev(next)->second;
  return data < range->data + range->nbytes ? range : nullptr;
}

bool Machine::overlaps(const std::byte* data, std::uint64_t nbytes) const {
  const auto next = ranges_.lower_bound(data);
  return find(data) || (next != ranges_.end() && next->first < data + nbytes);
}

bool Machine::knows(const std::byte* data, Kind kind) {
  const Lock lock(mutex_);
  const RangePtr range = find(data);
  return range && range->kind == kind;
}

std::byte* Machine::alias(const std::byte* data) {
  const Lock lock(mutex_);
  const RangePtr range = find(data);
  return range ? reach(range, data) : nullptr;
}

std::uint64_t Machine::device_nbytes() {
  const Lock lock(mutex_);
  return device_nbytes_;
}

/// Where an operand of a copy lies. Host memory must be the device's from end to end, one
/// registration of it, or not at all: the driver refuses what is half of one and half of another.
CUresult Machine::place(const std::byte* data, std::uint64_t nbytes, Side side, RangePtr& range) {
  range = find(data);
  if (!range) {
    if (side == Side::device) return CUDA_ERROR_ILLEGAL_ADDRESS;
    return overlaps(data, nbytes) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  }
  const bool on_device = range->kind == Kind::device;
  if (on_device && side == Side::host) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (holds(*range, data, nbytes)) return CUDA_SUCCESS;
  return on_device ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult Machine::copy(CUstream handle, std::vector<Move> moves, Side target, Side source,
                       bool waits) {
  Lock lock(mutex_);
  Stream* const into = stream(handle);
  if (!into) return CUDA_ERROR_INVALID_HANDLE;
  std::vector<RangePtr> ranges;
  std::vector<Access> accesses;
  for (Move& move : moves) {
    CUresult result = place(move.target, move.nbytes, target, move.to);
    if (!result) result = place(move.source, move.nbytes, source, move.from);
    if (result == CUDA_ERROR_ILLEGAL_ADDRESS) return fail(result, "a copy's address");
    if (result) return result;
    for (const RangePtr& range : {move.to, move.from})
      if (range) ranges.push_back(range);
    accesses.push_back({move.target, move.nbytes, true});
    accesses.push_back({move.source, move.nbytes, false});
  }
  for (Move& move : moves) {
    // The driver takes memory it doesn't know through its own, and the caller waits.
    const bool pageable = !move.to || !move.from;
    waits = waits || pageable;
    counts_["pageable_copies"] += pageable;
    ++counts_["copies"];
    counts_["nbytes_copied"] += static_cast<std::int64_t>(move.nbytes);
    if (settings_["fail_copy"] && --settings_["fail_copy"] == 0) move.fate = Fate::fails;
    if (settings_["hang_copy"] && --settings_["hang_copy"] == 0) {
      move.fate = Fate::hangs;
      move.hang = ++num_hangs_;
    }
  }
  const PointPtr point = give(
      *into, [this, into = streams_.at(handle), moves] { run_copies(*into, moves); }, ranges,
      accesses);
  return waits ? await(lock, point) : CUDA_SUCCESS;
}

/// Nothing may look at a target between a copy's start and its end: until the bytes come it holds
/// poison. The source is read late. Copies of a batch come in any order.
void Machine::run_copies(Stream& stream, std::vector<Move> moves) {
  std::shuffle(moves.begin(), moves.end(), stream.rng);
  for (const bool arrives : {false, true}) {
    for (const Move& move : moves) {
      {
        Lock lock(mutex_);
        if ((move.to && !move.to->live) || (move.from && !move.from->live)) {
          fail(CUDA_ERROR_ILLEGAL_ADDRESS, "a copy's memory was freed before the copy ran");
          return;
        }
        if (arrives && move.fate == Fate::hangs) {
          ++num_hung_;
          changed_.wait(lock, [&] { return error_ || num_released_ >= move.hang; });
          --num_hung_;
          changed_.notify_all();
        }
        if (arrives && move.fate == Fate::fails)
          fail(static_cast<CUresult>(settings_.at("fail_code")), "a copy was told to fail");
        if (error_) return;
      }
      if (arrives)
        std::memcpy(reach(move.to, move.target), reach(move.from, move.source), move.nbytes);
      else
        std::memset(reach(move.to, move.target), kComing, move.nbytes);
    }
    if (!arrives) delay(stream);
  }
}

CUresult Machine::fill(CUstream handle, std::byte* target, int value, std::uint64_t nbytes) {
  const Lock lock(mutex_);
  Stream* const into = stream(handle);
  if (!into) return CUDA_ERROR_INVALID_HANDLE;
  RangePtr range;
  if (const CUresult result = place(target, nbytes, Side::device, range))
    return fail(result, "a fill's address");
  give(*into,
       [this, into = streams_.at(handle), range, target, value, nbytes] {
         delay(*into);
         std::memset(reach(range, target), value, nbytes);
       },
       {range}, {{target, nbytes, true}});
  return CUDA_SUCCESS;
}

CUresult Machine::launch(CUstream handle, Launch launch) {
  const Lock lock(mutex_);
  Stream* const into = stream(handle);
  if (!into) return CUDA_ERROR_INVALID_HANDLE;
  if (settings_.at("guard")) return CUDA_ERROR_NOT_SUPPORTED;  // kernels have no other way
  ++counts_["launches"];
  const auto point = std::make_shared<PointPtr>();
  *point = give(*into,
                [this, into = streams_.at(handle), launch = std::move(launch), point] {
                  run_launch(*into, launch, *point);
                },
                {}, {});
  return CUDA_SUCCESS;
}

/// What a kernel touches may itself have been copied in before it.
void Machine::run_launch(Stream& stream, const Launch& launch, const PointPtr& point) {
  delay(stream);
  const std::vector<Access> accesses = launch.accesses();
  std::vector<RangePtr> ranges;
  {
    const Lock lock(mutex_);
    for (const Access& access : accesses)
      // Neighbouring registrations are one to a kernel.
      for (const std::byte* data = access.data; data < access.data + access.nbytes;) {
        const RangePtr range = find(data);
        if (!range) {
          fail(CUDA_ERROR_ILLEGAL_ADDRESS, "a kernel's address");
          return;
        }
        ranges.push_back(range);
        data = range->data + range->nbytes;
      }
    for (const RangePtr& range : ranges) ++range->num_pending;
    note(accesses, stream.number, point);
  }
  launch.run();
  const Lock lock(mutex_);
  for (const RangePtr& range : ranges) --range->num_pending;
}

void Machine::delay(Stream& stream) {
  const std::int64_t most = setting("max_delay_us");
  if (most <= 0 || stream.rng() % 2) return;
  std::this_thread::sleep_for(
      std::chrono::microseconds(stream.rng() % static_cast<std::uint64_t>(most)));
}

}  // namespace cuda_double
