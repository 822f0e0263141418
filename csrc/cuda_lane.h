// One direction of the link between host and CUDA device: its stream, and how blocks get into it.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "copy_method.h"
#include "cuda_context.h"
#include "cuda_kernels.h"
#include "pinned_ranges.h"

namespace tiered_mem::cuda {

/// Safe to share between threads. All calls need the context to be current.
class Lane {
 public:
  /// Throws DeviceError.
  Lane(Direction direction, std::shared_ptr<const Context> context, std::shared_ptr<Events> events,
       std::shared_ptr<const Kernels> kernels);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  /// Gives a batch to the stream, behind `after`. Memory that isn't pinned goes by copy engine
  /// whatever the method. Throws TransferError when nothing of the batch is on its way any more,
  /// and DeviceError for a method this driver doesn't have.
  MarkPtr copy(CopyMethod method, const std::vector<Piece>& pieces,
               const std::vector<MarkPtr>& after);

 private:
  // What the kernel is told, in pinned memory, until the launch that reads it has ended.
  struct Descriptors {
    CopyBlock* blocks;
    MarkPtr last_use;  // null: being filled, or never used
  };

  void copy_by_engine(const std::vector<Piece>& pieces);
  void copy_by_batch(const std::vector<Piece>& pieces);
  void copy_by_kernel(const std::vector<Piece>& pieces, std::vector<Descriptors*>& used);
  bool ended(const Descriptors& descriptors) const;
  Descriptors& idle_descriptors(const std::vector<Descriptors*>& used);
  [[noreturn]] void fail(CUresult result, const char* function, const Piece& piece) const;

  const Direction direction_;
  const std::shared_ptr<const Context> context_;
  const std::shared_ptr<Events> events_;
  const std::shared_ptr<const Kernels> kernels_;
  std::mutex mutex_;  // a batch enters the stream as a whole
  CUstream stream_ = nullptr;
  std::list<Descriptors> descriptors_;
};

}  // namespace tiered_mem::cuda
