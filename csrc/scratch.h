#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace tiered_mem {

// O_DIRECT wants memory, offsets and lengths to be multiples of this.
inline constexpr size_t kIoAlignment = 4096;

inline constexpr size_t round_up(size_t nbytes, size_t multiple) {
  return (nbytes + multiple - 1) / multiple * multiple;
}

// Memory that O_DIRECT can read into. Grows on demand, and forgets its content when it does.
class AlignedBuffer {
 public:
  std::byte* reserve(size_t nbytes) {
    if (nbytes > capacity_) {
      const size_t rounded = round_up(nbytes, kIoAlignment);
      data_.reset(static_cast<std::byte*>(std::aligned_alloc(kIoAlignment, rounded)));
      capacity_ = data_ ? rounded : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t capacity_ = 0;
};

// What one I/O thread needs to read and decode chunks. Not shared between threads.
struct Scratch {
  AlignedBuffer stored;  // bytes as they lie in the file
  AlignedBuffer planes;  // a decompressed chunk before its byte planes are merged
};

}  // namespace tiered_mem
