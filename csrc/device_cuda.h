// A CUDA device: copies by its two engines, in the order that its streams and marks give them.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "copy_method.h"
#include "cuda_calibration.h"
#include "cuda_context.h"
#include "cuda_kernels.h"
#include "cuda_lane.h"
#include "cuda_memory.h"
#include "device.h"

namespace tiered_mem {

struct CudaConfig {
  int ordinal = 0;
  std::string copy_method = "auto";  // "auto", "engine", "batch", "kernel"
};

/// On a device that shares its memory with the CPU, HBM is host memory and copies are the host's.
///
/// After a fork every call raises RuntimeClosed in the child, and nothing is given back there.
class CudaDevice final : public Device {
 public:
  /// Throws DeviceError if the driver is missing or too old, or there is no such device;
  /// ConfigError for an unknown method.
  explicit CudaDevice(const CudaConfig& config);

  std::shared_ptr<Memory> allocate(std::uint64_t nbytes) override;
  std::shared_ptr<Memory> allocate_staging(std::uint64_t nbytes) override;
  bool host_accessible() const override { return integrated_; }
  bool asynchronous() const override { return !integrated_; }
  bool stream_ordered() const override { return true; }
  MarkPtr copy_async(Direction direction, const std::vector<Copy>& copies,
                     const std::vector<MarkPtr>& after) override;
  bool reached(const MarkPtr& mark) override;
  void wait(const MarkPtr& mark) override;
  MarkPtr mark_compute(Compute compute) override;
  void hold_compute(Compute compute, const MarkPtr& mark) override;
  bool reaches(const std::byte* host, std::uint64_t nbytes) const override;
  std::shared_ptr<void> pin(std::byte* host, std::uint64_t nbytes) override;
  void retire_pinned(const std::byte* host) override { ranges_->remove(host); }

  std::string name() const;
  std::string pci_bus_id() const;
  int driver_version() const { return context_->api().version; }
  std::pair<int, int> compute_capability() const;
  /// Whether its memory is the CPU's.
  bool integrated() const { return integrated_; }
  /// Bytes free and in all.
  std::pair<std::uint64_t, std::uint64_t> memory() const;

  /// See cuda_kernels.h.
  void load_kernels(const std::string& image);
  void launch(const std::string& kernel, const cuda::Kernels::Extent& grid,
              const cuda::Kernels::Extent& block, const std::vector<std::uint64_t>& arguments,
              Compute compute);

  /// Measures; `set_calibration` makes use of it. See cuda_calibration.h.
  cuda::Calibration calibrate();
  /// Throws ConfigError.
  void set_calibration(const std::vector<CopyTime>& times);
  /// How so many equal blocks of pinned memory would be copied.
  CopyMethod method_for(Direction direction, std::uint64_t nbytes, std::uint64_t num_copies) const;

 private:
  CopyMethodSet available() const;
  void copy_on_host(const std::vector<Copy>& copies, const std::vector<MarkPtr>& after);

  const std::shared_ptr<const cuda::Context> context_;
  const std::shared_ptr<cuda::Events> events_;
  const std::shared_ptr<cuda::Kernels> kernels_;
  const std::shared_ptr<PinnedRanges> ranges_;
  const bool integrated_;
  const std::unique_ptr<Device> host_;
  const std::optional<CopyMethod> forced_method_;  // none: the fastest
  std::shared_ptr<const CopyMethods> methods_;     // by std::atomic_load and std::atomic_store
  std::unique_ptr<cuda::Lane> in_;
  std::unique_ptr<cuda::Lane> out_;
};

}  // namespace tiered_mem
