#pragma once

#include <cstddef>

#include "direct_io.h"

namespace tiered_mem {

// Reads whole blocks for a caller that waits for them. Several chunks are in flight at once (Linux
// native AIO), and those that have come are verified and decoded while the rest still comes. One
// reader per thread.
class BlockReader {
 public:
  BlockReader();
  ~BlockReader();
  BlockReader(const BlockReader&) = delete;
  BlockReader& operator=(const BlockReader&) = delete;

  // False if the kernel refuses AIO: then each read is waited for in turn.
  bool async() const { return context_ != 0; }

  // Reads extent.nbytes bytes to `dst`, where `room` bytes may be written.
  // Throws ConfigError if that is too little, and like read_chunk.
  void read(const Extent& extent, std::byte* dst, size_t room);

 private:
  unsigned long context_ = 0;
  AlignedBuffer slots_;
  Scratch scratch_;
};

}  // namespace tiered_mem
