// Memory of a device that came in pieces: slots in it are addresses.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "device.h"

namespace tiered_mem {

/// Owns the segments. Whoever keeps this alive keeps alive those that weren't taken out.
class Segments final : public Memory {
 public:
  std::byte* data() const override { return nullptr; }
  std::uint64_t nbytes() const override { return 0; }

  void add(std::shared_ptr<Memory> segment) {
    const std::lock_guard lock(mutex_);
    const auto address = reinterpret_cast<std::uintptr_t>(segment->data());
    segments_[address] = std::move(segment);
  }
  std::shared_ptr<Memory> take(std::uintptr_t address) {
    const std::lock_guard lock(mutex_);
    return std::move(segments_.extract(address).mapped());
  }

 private:
  std::mutex mutex_;
  std::map<std::uintptr_t, std::shared_ptr<Memory>> segments_;
};

}  // namespace tiered_mem
