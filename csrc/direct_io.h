// Reading blocks at their file offsets, past the page cache where the filesystem allows it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codec.h"
#include "scratch.h"

namespace tiered_mem {

// The most raw bytes of one chunk: what a demand read may have to wait for.
inline constexpr size_t kChunkNbytes = size_t{1} << 20;

// Whether O_DIRECT on `fd` passes the page cache by. tmpfs accepts the flag and has no device.
bool bypasses_page_cache(int fd);

// A file open for reading, by O_DIRECT if its filesystem offers that at 4096-byte alignment.
// Safe to use from any number of threads.
class File {
 public:
  explicit File(std::string path);  // throws IoError
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  int fd() const { return fd_; }
  bool direct() const { return direct_; }  // false: reads go through the page cache

  // Reads at least `needed` and at most `nbytes` bytes; a file may end between the two.
  // Throws IoError. If direct(), `offset`, `nbytes` and `dst` must be aligned.
  void read(uint64_t offset, size_t nbytes, size_t needed, std::byte* dst) const;

 private:
  std::string path_;
  int fd_ = -1;
  bool direct_ = false;
};

struct Chunk {
  uint64_t offset;  // of the file, a multiple of kIoAlignment
  uint32_t stored_nbytes;
  uint32_t raw_nbytes;
  uint32_t crc;  // of the stored bytes
};

// Where a block's bytes lie. Every chunk but the last holds kChunkNbytes raw bytes.
// Right only while the snapshot it was taken from is open; reads after that may throw
// ChecksumMismatch, but don't return other bytes than the block's.
struct Extent {
  std::shared_ptr<File> file;
  Codec codec;
  uint64_t nbytes;  // raw
  std::vector<Chunk> chunks;
  uint64_t generation = 0;  // grows with every rewrite of the store
};

// Builds an extent from a catalogue entry: chunks lie one after another from `offset`, each
// starting at a multiple of kIoAlignment; `table` holds stored_nbytes, raw_nbytes and crc of each.
// Throws StoreError if these don't fit together.
Extent make_extent(std::shared_ptr<File> file, Codec codec, uint64_t nbytes, uint64_t offset,
                   const uint32_t* table, size_t num_chunks);

// The extent of a block that lies nowhere, for links that move no bytes.
Extent nowhere(uint64_t nbytes);

// Reads, verifies and decodes chunk `i` to `dst`, the block's base + i * kChunkNbytes.
// There must be room for the chunk's bytes rounded up to kIoAlignment. If `dst` is aligned, plain
// chunks land in place. Throws IoError, ChecksumMismatch, StoreError.
void read_chunk(const Extent& extent, size_t i, std::byte* dst, Scratch& scratch);

// The same where only `room` bytes may be written, at least the chunk's.
void read_chunk(const Extent& extent, size_t i, std::byte* dst, size_t room, Scratch& scratch);

// Reads a part of chunk `i`, uncompressed: `nbytes` from byte `first` of it, a multiple of
// kIoAlignment, to `dst` + `first`, aligned, with room as for the chunk. Checks nothing: call
// `check_chunk` when all parts are there. Throws IoError.
void read_piece(const Extent& extent, size_t i, uint64_t first, uint64_t nbytes, std::byte* dst);

// Compares the checksum of an uncompressed chunk's bytes. Throws ChecksumMismatch.
void check_chunk(const Extent& extent, size_t i, const std::byte* bytes);

// Whether chunk `i` can be read straight to `dst`, where `room` bytes may be written.
bool lands_in_place(const Extent& extent, size_t i, const std::byte* dst, size_t room);

// Compares `crc`, that of chunk `i`'s stored bytes in `buffer`, and decodes them to `dst` unless
// they lie there. Throws ChecksumMismatch, StoreError.
void finish_chunk(const Extent& extent, size_t i, uint32_t crc, const std::byte* buffer,
                  std::byte* dst, Scratch& scratch);

}  // namespace tiered_mem
