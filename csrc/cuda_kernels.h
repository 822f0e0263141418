// Kernel images on a CUDA device.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_context.h"

namespace tiered_mem::cuda {

/// What csrc/kernels.cu is told of a block that it copies.
struct CopyBlock {
  unsigned long long target;
  unsigned long long source;
  unsigned long long nbytes;
};
constexpr const char* kCopyKernel = "tiered_mem_copy_blocks";

/// Safe to share between threads. All calls need the context to be current. Its owner goes after
/// what was launched has ended.
class Kernels {
 public:
  explicit Kernels(std::shared_ptr<const Context> context) : context_(std::move(context)) {}
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  /// Loads a cubin, a fatbin or PTX made of csrc/kernels.cu; its kernels take the place of those
  /// loaded before. Throws DeviceError.
  void load(const std::string& image);
  /// Throws DeviceError if no image is loaded, or none that has it.
  CUfunction find(const std::string& name) const;
  /// The kernel that copies blocks, null before `load`.
  CUfunction copy_kernel() const { return copy_kernel_; }

  using Extent = std::array<unsigned, 3>;
  /// Queues a kernel in `stream`. Each argument is the 8 bytes of a number or an address, of which
  /// a smaller parameter takes the lower ones. Throws TransferError.
  void launch(CUfunction function, const Extent& grid, const Extent& block,
              std::vector<std::uint64_t> arguments, CUstream stream) const;

 private:
  const std::shared_ptr<const Context> context_;
  mutable std::mutex mutex_;
  std::vector<CUmodule> modules_;  // the newest last; kept, for its kernels may be running
  std::atomic<CUfunction> copy_kernel_{nullptr};
};

}  // namespace tiered_mem::cuda
