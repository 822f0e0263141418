#include "cuda_memory.h"

namespace tiered_mem::cuda {

namespace {

class PinnedMemory final : public Memory {
 public:
  PinnedMemory(std::shared_ptr<const Context> context, std::shared_ptr<PinnedRanges> ranges,
               std::uint64_t nbytes)
      : context_(std::move(context)), ranges_(std::move(ranges)), nbytes_(nbytes) {
    if (nbytes == 0) return;
    const Current current(*context_);
    void* host = nullptr;
    // Of this the device knows the same addresses as the host.
    const CUresult result = context_->api().cuMemHostAlloc(&host, nbytes, CU_MEMHOSTALLOC_PORTABLE);
    if (result != CUDA_SUCCESS)
      throw BudgetError("can't allocate " + std::to_string(nbytes) +
                        " bytes of pinned host memory: " + context_->api().text(result) +
                        "; ask for a smaller budget");
    data_ = static_cast<std::byte*>(host);
    ranges_->add(data_, nbytes, reinterpret_cast<std::uint64_t>(host));
  }
  ~PinnedMemory() override {
    if (data_ == nullptr || context_->forked()) return;
    ranges_->remove(data_);
    const Current current(*context_);
    context_->api().cuMemFreeHost(data_);
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const override { return data_; }
  std::uint64_t nbytes() const override { return nbytes_; }

 private:
  const std::shared_ptr<const Context> context_;
  const std::shared_ptr<PinnedRanges> ranges_;
  const std::uint64_t nbytes_;
  std::byte* data_ = nullptr;
};

class Pin {
 public:
  Pin(std::shared_ptr<const Context> context, std::shared_ptr<PinnedRanges> ranges, std::byte* host,
      std::uint64_t nbytes)
      : context_(std::move(context)), ranges_(std::move(ranges)), host_(host) {
    const Driver& api = context_->api();
    const Current current(*context_);
    CUresult result = api.cuMemHostRegister(
        host, nbytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
    if (result != CUDA_SUCCESS) fail(result, nbytes);
    CUdeviceptr on_device = 0;
    result = api.cuMemHostGetDevicePointer(&on_device, host, 0);
    if (result != CUDA_SUCCESS) {
      api.cuMemHostUnregister(host);
      fail(result, nbytes);
    }
    ranges_->add(host, nbytes, on_device);
  }
  ~Pin() {
    if (context_->forked()) return;
    ranges_->remove(host_);
    const Current current(*context_);
    context_->api().cuMemHostUnregister(host_);
  }
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

 private:
  [[noreturn]] void fail(CUresult result, std::uint64_t nbytes) const {
    throw DeviceError("can't pin " + std::to_string(nbytes) +
                      " bytes of host memory: " + context_->api().text(result) +
                      "; leave more memory free, or lower the DRAM budget");
  }

  const std::shared_ptr<const Context> context_;
  const std::shared_ptr<PinnedRanges> ranges_;
  std::byte* const host_;
};

}  // namespace

std::shared_ptr<Memory> allocate_pinned(std::shared_ptr<const Context> context,
                                        std::shared_ptr<PinnedRanges> ranges,
                                        std::uint64_t nbytes) {
  return std::make_shared<PinnedMemory>(std::move(context), std::move(ranges), nbytes);
}

std::shared_ptr<void> pin(std::shared_ptr<const Context> context,
                          std::shared_ptr<PinnedRanges> ranges, std::byte* host,
                          std::uint64_t nbytes) {
  return std::make_shared<Pin>(std::move(context), std::move(ranges), host, nbytes);
}

}  // namespace tiered_mem::cuda
