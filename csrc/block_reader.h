#pragma once

#include <cstddef>

#include "direct_io.h"

namespace tiered_mem {

// Reads whole blocks for a caller that waits for them. A few reads are kept in flight (Linux native
// AIO), and what has come is verified and decoded while the rest still comes, so that the checksum
// costs the device no time. One reader per thread.
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
  Scratch scratch_;
};

}  // namespace tiered_mem
