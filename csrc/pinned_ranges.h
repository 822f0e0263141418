// The host memory that a device's copies reach without a detour.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "device.h"

namespace tiered_mem {

/// A part of a copy that lies in one pinned range, or in none.
struct Piece {
  std::byte* host;
  std::uint64_t device;
  std::uint64_t host_on_device;  // the address by which the device knows `host`; 0: not pinned
  std::uint64_t nbytes;
};

/// Safe to share between threads. Ranges don't overlap.
class PinnedRanges {
 public:
  void add(const std::byte* host, std::uint64_t nbytes, std::uint64_t on_device) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    ranges_[address(host)] = {address(host) + nbytes, on_device};
  }
  void remove(const std::byte* host) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    ranges_.erase(address(host));
  }

  /// Whether ranges that follow each other cover it.
  bool cover(const std::byte* host, std::uint64_t nbytes) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    for (std::uint64_t at = address(host), end = at + nbytes; at < end;) {
      const Stretch stretch = find(at);
      if (stretch.on_device == 0) return false;
      at = stretch.end;
    }
    return true;
  }

  /// Cuts copies where ranges begin and end: a driver refuses one that reaches over such a border.
  std::vector<Piece> cut(Direction direction, const std::vector<Copy>& copies) const {
    std::vector<Piece> pieces;
    pieces.reserve(copies.size());
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    for (const Copy& copy : copies) {
      std::uint64_t host = address(direction == Direction::in ? copy.source : copy.target);
      std::uint64_t device = address(direction == Direction::in ? copy.target : copy.source);
      for (std::uint64_t left = copy.nbytes; left > 0;) {
        const Stretch stretch = find(host);
        const std::uint64_t nbytes = std::min(left, stretch.end - host);
        pieces.push_back({reinterpret_cast<std::byte*>(host), device, stretch.on_device, nbytes});
        host += nbytes;
        device += nbytes;
        left -= nbytes;
      }
    }
    return pieces;
  }

 private:
  struct Range {
    std::uint64_t end;
    std::uint64_t on_device;
  };
  // From an address up to where its range, or the gap it lies in, ends.
  struct Stretch {
    std::uint64_t end;
    std::uint64_t on_device;
  };

  static std::uint64_t address(const std::byte* host) {
    return reinterpret_cast<std::uint64_t>(host);
  }

  Stretch find(std::uint64_t at) const {
    const auto next = ranges_.upper_bound(at);
    if (next != ranges_.begin()) {
      const auto& [begin, range] = *std::prev(next);
      if (at < range.end) return {range.end, range.on_device + (at - begin)};
    }
    return {next == ranges_.end() ? UINT64_MAX : next->first, 0};
  }

  mutable std::shared_mutex mutex_;
  std::map<std::uint64_t, Range> ranges_;
};

/// Joins copies whose sources and targets both follow each other, and drops empty ones. The driver
/// doesn't, and each copy costs it the same. No join crosses a multiple of 2 MiB of device memory:
/// there another allocation may begin, and a copy must not reach over two.
inline std::vector<Copy> join_neighbours(Direction direction, const std::vector<Copy>& copies) {
  constexpr std::uint64_t kAllocationNbytes = 2 << 20;
  std::vector<Copy> joined;
  joined.reserve(copies.size());
  for (const Copy& copy : copies) {
    if (copy.nbytes == 0) continue;
    if (!joined.empty()) {
      Copy& last = joined.back();
      const std::byte* on_device = direction == Direction::in ? copy.target : copy.source;
      if (last.target + last.nbytes == copy.target && last.source + last.nbytes == copy.source &&
          reinterpret_cast<std::uint64_t>(on_device) % kAllocationNbytes != 0) {
        last.nbytes += copy.nbytes;
        continue;
      }
    }
    joined.push_back(copy);
  }
  return joined;
}

}  // namespace tiered_mem
