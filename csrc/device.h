// Where a tier's memory comes from and how bytes get into it.
//
// The host device is here; a CUDA device implements the same interface over the driver API. Reads
// land in place, so a device must be `host_accessible`; one that isn't needs staging in DRAM, which
// comes with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace tiered_mem {

/// A tier's memory, freed with its last owner: an event, a ticket or a view keeps it alive after
/// the runtime is closed.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual std::byte* data() const = 0;
  virtual std::uint64_t nbytes() const = 0;
  /// Gives the physical memory of a range back. The range stays usable; its content is lost.
  virtual void decommit(std::uint64_t offset, std::uint64_t nbytes) = 0;
};

class Device {
 public:
  virtual ~Device() = default;
  /// Reserves `nbytes`, aligned to 4096. Host memory is committed only when it is touched.
  virtual std::shared_ptr<Memory> allocate(std::uint64_t nbytes) = 0;
  /// Whether I/O threads may write into its memory.
  virtual bool host_accessible() const = 0;

  /// A point on the device's copy stream, to be waited for by `wait`.
  using Mark = std::uint64_t;
  /// Copies between this device's memory and host memory, or within one of them. May return
  /// before the bytes have arrived: they have once `wait` returns.
  virtual Mark copy_async(std::byte* target, const std::byte* source, std::uint64_t nbytes) = 0;
  virtual void wait(Mark mark) = 0;
};

std::unique_ptr<Device> make_host_device();

}  // namespace tiered_mem
