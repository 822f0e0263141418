// Host memory that a device is brought to reach piece by piece.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"

namespace tiered_mem {

/// Pieces are pinned from the start on and unpinned when their memory is given back; what was given
/// back in the middle is pinned again when its turn comes.
class PinnedMemory final : public Memory {
 public:
  PinnedMemory(std::shared_ptr<Memory> memory, std::shared_ptr<Device> device)
      : memory_(std::move(memory)), device_(std::move(device)) {}

  std::byte* data() const override { return memory_->data(); }
  std::uint64_t nbytes() const override { return memory_->nbytes(); }

  /// Nothing is copied there any more. What was pinned as a whole is unpinned by the next `pin`,
  /// since that may take long. The memory of a piece that goes beyond the range stays: a device may
  /// be reading there.
  void decommit(std::uint64_t offset, std::uint64_t nbytes) override {
    const std::lock_guard lock(mutex_);
    const std::uint64_t end = offset + nbytes;
    std::uint64_t from = offset;
    for (auto piece = first_behind(offset); piece != pieces_.end() && piece->first < end;) {
      const std::uint64_t piece_end = piece->first + piece->second.nbytes;
      if (piece->first >= offset && piece_end <= end) {
        device_->retire_pinned(data() + piece->first);
        retired_.push_back(std::move(piece->second.handle));
        piece = pieces_.erase(piece);
        continue;
      }
      if (piece->first > from) memory_->decommit(from, piece->first - from);
      from = piece_end;
      ++piece;
    }
    if (from < end) memory_->decommit(from, end - from);
  }

  /// Pins at most `nbytes` more below `end`. Returns how many; 0 when all is pinned. Throws
  /// DeviceError.
  std::uint64_t pin(std::uint64_t end, std::uint64_t nbytes) {
    const std::lock_guard one_at_a_time(pinning_);
    {
      std::vector<std::shared_ptr<void>> retired;
      {
        const std::lock_guard lock(mutex_);
        retired.swap(retired_);
      }
    }
    const std::lock_guard lock(mutex_);
    std::uint64_t from = 0;
    auto next = pieces_.begin();
    for (; next != pieces_.end() && next->first == from; ++next)
      from = next->first + next->second.nbytes;
    const std::uint64_t to =
        std::min({from + nbytes, end, next == pieces_.end() ? end : next->first});
    if (to <= from) return 0;
    pieces_[from] = {to - from, device_->pin(data() + from, to - from)};
    return to - from;
  }

 private:
  struct Piece {
    std::uint64_t nbytes = 0;
    std::shared_ptr<void> handle;
  };
  std::map<std::uint64_t, Piece>::iterator first_behind(std::uint64_t offset) {
    auto piece = pieces_.upper_bound(offset);
    if (piece != pieces_.begin() &&
        std::prev(piece)->first + std::prev(piece)->second.nbytes > offset)
      --piece;
    return piece;
  }

  std::shared_ptr<Memory> memory_;
  std::shared_ptr<Device> device_;
  std::mutex pinning_;
  std::mutex mutex_;
  std::map<std::uint64_t, Piece> pieces_;       // by offset; gone before the memory
  std::vector<std::shared_ptr<void>> retired_;  // no copies go there
};

}  // namespace tiered_mem
