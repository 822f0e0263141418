// The double of CUDA's driver as the programs beside this use it: tests/cuda_double/control.cpp.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks.h"
#include "cuda_context.h"
#include "device.h"

using blocks::check;

// The double has thread-local variables, as any loaded library may. A dead thread's are freed by
// whichever thread next gives its stack back, in an order that ThreadSanitizer can't see.
extern "C" const char* __tsan_default_suppressions() { return "race:_dl_deallocate_tls"; }

/// What the environment's TIERED_MEM_CUDA_DRIVER names.
class Double {
 public:
  Double() : library_(dlopen(std::getenv("TIERED_MEM_CUDA_DRIVER"), RTLD_NOW)) {
    check(library_ != nullptr, "no double");
  }
  long long count(const char* name) { return function<long long(const char*)>("count")(name); }
  void set(const char* name, long long value) {
    check(function<int(const char*, long long)>("set")(name, value) == 0, name);
  }
  /// The n-th call of a function from now returns a code.
  void fail(const char* name, long long nth, int code) {
    function<void(const char*, long long, int)>("fail")(name, nth, code);
  }
  void release_hung() { function<void()>("release_hung")(); }
  /// As torch's caching allocator takes memory back: without waiting for the device.
  void free(std::uint64_t address) { function<int(unsigned long long)>("free")(address); }

  /// What a broken device may still write to is kept for ever.
  void check_nothing_lives(bool broken = false) {
    for (const char* kind : {"streams", "events", "allocations", "host_allocations",
                             "registrations", "modules", "contexts"}) {
      const long long live = count((std::string("live_") + kind).c_str());
      if (live != 0) std::fprintf(stderr, "%lld %s were left\n", live, kind);
      const bool kept = broken && kind == std::string("host_allocations");
      check(live == 0 || kept, "something was left behind");
    }
  }
  void check_order() {
    check(count("races") == 0, "accesses without an order");
    check(count("freed_in_use") == 0, "memory was given back while work on it was on its way");
  }

 private:
  template <typename Signature>
  Signature* function(const std::string& name) {
    void* const found = dlsym(library_, ("cuda_double_" + name).c_str());
    check(found != nullptr, name.c_str());
    return reinterpret_cast<Signature*>(found);
  }
  void* library_;
};

/// Device memory as torch would give it: it goes back without waiting.
class DeviceMemory final : public tiered_mem::Memory {
 public:
  DeviceMemory(Double& driver, std::shared_ptr<const tiered_mem::cuda::Context> context,
               std::uint64_t nbytes)
      : driver_(driver), context_(std::move(context)), nbytes_(nbytes) {
    const tiered_mem::cuda::Current current(*context_);
    context_->api().check(context_->api().cuMemAlloc(&address_, nbytes), "no device memory");
  }
  ~DeviceMemory() override { driver_.free(address_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::byte* data() const override { return reinterpret_cast<std::byte*>(address_); }
  std::uint64_t nbytes() const override { return nbytes_; }

 private:
  Double& driver_;
  const std::shared_ptr<const tiered_mem::cuda::Context> context_;
  const std::uint64_t nbytes_;
  tiered_mem::cuda::CUdeviceptr address_ = 0;
};

/// A stream to compute on.
class ComputeStream {
 public:
  explicit ComputeStream(std::shared_ptr<const tiered_mem::cuda::Context> context)
      : context_(std::move(context)) {
    const tiered_mem::cuda::Current current(*context_);
    context_->api().check(context_->api().cuStreamCreateWithPriority(&stream_, 1, 0), "no stream");
  }
  ~ComputeStream() {
    const tiered_mem::cuda::Current current(*context_);
    context_->api().cuStreamDestroy(stream_);
  }
  ComputeStream(const ComputeStream&) = delete;
  ComputeStream& operator=(const ComputeStream&) = delete;

  tiered_mem::Compute number() const { return reinterpret_cast<tiered_mem::Compute>(stream_); }
  /// What stands for computing: it reads device memory when the stream gets there.
  int read(std::byte* host, std::uint64_t address, std::uint64_t nbytes) {
    const tiered_mem::cuda::Current current(*context_);
    return context_->api().cuMemcpyDtoHAsync(host, address, nbytes, stream_);
  }
  int synchronize() {
    const tiered_mem::cuda::Current current(*context_);
    return context_->api().cuStreamSynchronize(stream_);
  }

 private:
  const std::shared_ptr<const tiered_mem::cuda::Context> context_;
  tiered_mem::cuda::CUstream stream_ = nullptr;
};
