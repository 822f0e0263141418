#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "device.h"
#include "error.h"
#include "process.h"

namespace tiered_mem {

namespace {

class HostMemory final : public Memory {
 public:
  explicit HostMemory(std::uint64_t nbytes) : nbytes_(nbytes) {
    if (nbytes == 0) return;
    void* address = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED)
      throw BudgetError("can't reserve " + std::to_string(nbytes) + " bytes of host memory: " +
                        std::strerror(errno) + "; ask for a smaller budget");
    data_ = static_cast<std::byte*>(address);
    // Fewer TLB misses and page faults. Where the kernel has none, 4 KiB pages work as well.
    madvise(address, nbytes, MADV_HUGEPAGE);
    // A fork (a data loader's worker) must neither copy nor share the arena. The runtime refuses
    // to be used in a child; only a view kept from before the fork would fault there.
    madvise(address, nbytes, MADV_DONTFORK);
  }
  ~HostMemory() override {
    // In a forked child something else may lie at these addresses by now.
    if (data_ != nullptr && generation_ == process_generation()) munmap(data_, nbytes_);
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* data() const override { return data_; }
  std::uint64_t nbytes() const override { return nbytes_; }
  void decommit(std::uint64_t offset, std::uint64_t nbytes) override {
    madvise(data_ + offset, nbytes, MADV_DONTNEED);
  }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t nbytes_;
  unsigned generation_ = process_generation();
};

class HostDevice final : public Device {
 public:
  std::shared_ptr<Memory> allocate(std::uint64_t nbytes) override {
    return std::make_shared<HostMemory>(nbytes);
  }
  std::shared_ptr<Memory> allocate_staging(std::uint64_t nbytes) override {
    return allocate(nbytes);
  }
  bool host_accessible() const override { return true; }
  MarkPtr copy_async(Direction, const std::vector<Copy>& copies,
                     const std::vector<MarkPtr>&) override {
    for (const Copy& copy : copies) std::memcpy(copy.target, copy.source, copy.nbytes);
    return nullptr;
  }
  bool reached(const MarkPtr&) override { return true; }
  void wait(const MarkPtr&) override {}
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace tiered_mem
