// Where a tier's memory comes from and how bytes get into it.
//
// device_host.cpp copies at once; device_cuda.cpp and device_queue.cpp tell a copy and go on, and a
// mark says when it has arrived. The transfer engine stages what a device can't reach by itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "error.h"

namespace tiered_mem {

/// A tier's memory, freed with its last owner: an event, a ticket or a view keeps it alive after
/// the runtime is closed.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual std::byte* data() const = 0;
  virtual std::uint64_t nbytes() const = 0;
  /// Gives the physical memory of a range back. The range stays usable; its content is lost.
  virtual void decommit(std::uint64_t /*offset*/, std::uint64_t /*nbytes*/) {}
};

/// From host memory into the device's, or out of it.
enum class Direction : std::uint8_t { in, out };

struct Copy {
  std::byte* target;
  const std::byte* source;
  std::uint64_t nbytes;
};

/// A point in a device's work. Null stands for one that has been reached.
class Mark {
 public:
  virtual ~Mark() = default;
};
using MarkPtr = std::shared_ptr<const Mark>;

/// Where a caller computes: a stream's handle, or what else the device knows it by.
using Compute = std::uint64_t;

/// Safe to share between threads.
class Device {
 public:
  virtual ~Device() = default;

  /// Reserves `nbytes`, aligned to 4096. Host memory is committed only when it is touched. Throws
  /// BudgetError, DeviceError where a tier's memory comes in segments instead.
  virtual std::shared_ptr<Memory> allocate(std::uint64_t nbytes) = 0;
  /// Host memory that copies reach without a detour, aligned to 4096. Throws BudgetError.
  virtual std::shared_ptr<Memory> allocate_staging(std::uint64_t nbytes) = 0;
  /// Whether I/O threads may write into its memory: then it is host memory itself.
  virtual bool host_accessible() const = 0;
  /// Whether `copy_async` may return before the bytes have arrived.
  virtual bool asynchronous() const { return false; }
  /// Whether computing can be made to wait for a mark, so that the host needn't.
  virtual bool stream_ordered() const { return false; }

  /// Starts a batch of copies that come after all of `after`. Batches of one direction arrive in
  /// the order of the calls. The mark is reached when all have arrived. Throws TransferError.
  virtual MarkPtr copy_async(Direction direction, const std::vector<Copy>& copies,
                             const std::vector<MarkPtr>& after) = 0;
  /// Doesn't wait. Throws TransferError if the device failed since.
  virtual bool reached(const MarkPtr& mark) = 0;
  virtual void wait(const MarkPtr& mark) = 0;

  /// A point behind all that was given to `compute` until now.
  virtual MarkPtr mark_compute(Compute /*compute*/) { return nullptr; }
  /// What is given to `compute` from now on comes after the mark.
  virtual void hold_compute(Compute /*compute*/, const MarkPtr& mark) { wait(mark); }

  /// Whether copies from and to this host memory need no staging.
  virtual bool reaches(const std::byte* /*host*/, std::uint64_t /*nbytes*/) const { return true; }
  /// Lets copies reach a range of host memory, page-aligned, as long as the handle lives. Throws
  /// DeviceError.
  virtual std::shared_ptr<void> pin(std::byte* /*host*/, std::uint64_t /*nbytes*/) {
    return nullptr;
  }
  /// No further copy goes to a range that was pinned from `host` on: its handle may then end at
  /// leisure, which can take as long as the device does.
  virtual void retire_pinned(const std::byte* /*host*/) {}
};

std::unique_ptr<Device> make_host_device();

}  // namespace tiered_mem
