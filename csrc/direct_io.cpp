#include "direct_io.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "checksum.h"
#include "error.h"

namespace tiered_mem {
namespace {

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kIoAlignment == 0; }

}  // namespace

bool bypasses_page_cache(int fd) {
  struct statfs fs;
  if (fstatfs(fd, &fs) == 0 && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC)) return false;
#ifdef STATX_DIOALIGN
  struct statx info;
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) != 0) {
    return info.stx_dio_offset_align != 0 && info.stx_dio_offset_align <= kIoAlignment &&
           info.stx_dio_mem_align <= kIoAlignment;
  }
#endif
  return true;
}

File::File(std::string path) : path_(std::move(path)) {
  fd_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  direct_ = fd_ >= 0 && bypasses_page_cache(fd_);
  if (fd_ >= 0 && direct_) return;
  if (fd_ >= 0) close(fd_);
  fd_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) throw IoError(errno, path_, 0, "opening");
}

File::~File() { close(fd_); }

void File::read(uint64_t offset, size_t nbytes, size_t needed, std::byte* dst) const {
  size_t done = 0;
  while (done < needed) {
    const ssize_t got = pread(fd_, dst + done, nbytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw IoError(errno, path_, offset + done, "reading");
    if (got == 0) throw IoError(0, path_, offset + done, "reading");
    done += static_cast<size_t>(got);
  }
}

Extent nowhere(uint64_t nbytes) {
  Extent extent{nullptr, Codec::none, nbytes, {}};
  for (uint64_t at = 0; at < nbytes; at += kChunkNbytes) {
    const auto left = static_cast<uint32_t>(std::min<uint64_t>(kChunkNbytes, nbytes - at));
    extent.chunks.push_back({0, left, left, 0});
  }
  return extent;
}

Extent make_extent(std::shared_ptr<File> file, Codec codec, uint64_t nbytes, uint64_t offset,
                   const uint32_t* table, size_t num_chunks) {
  // zstd adds a few bytes to what it can't compress; anything larger wasn't written by us.
  constexpr size_t kMaxStored = kChunkNbytes + kIoAlignment;
  bool sound = codec <= Codec::zstd_planes2 && offset % kIoAlignment == 0;
  Extent extent{std::move(file), codec, nbytes, {}, 0};
  extent.chunks.reserve(num_chunks);
  uint64_t left = nbytes;
  for (size_t i = 0; i < num_chunks; ++i, table += 3) {
    const Chunk chunk{offset, table[0], table[1], table[2]};
    sound = sound && chunk.raw_nbytes > 0 && chunk.stored_nbytes > 0 &&
            chunk.raw_nbytes == std::min<uint64_t>(left, kChunkNbytes) &&
            chunk.stored_nbytes <= kMaxStored &&
            (codec != Codec::none || chunk.stored_nbytes == chunk.raw_nbytes);
    left -= std::min<uint64_t>(left, chunk.raw_nbytes);
    offset += round_up(chunk.stored_nbytes, kIoAlignment);
    extent.chunks.push_back(chunk);
  }
  if (!sound || left != 0)
    throw StoreError("a catalogue entry of " + extent.file->path() + " is damaged");
  return extent;
}

bool lands_in_place(const Extent& extent, size_t i, const std::byte* dst, size_t room) {
  return extent.codec == Codec::none && is_aligned(dst) &&
         room >= round_up(extent.chunks[i].stored_nbytes, kIoAlignment);
}

void finish_chunk(const Extent& extent, size_t i, uint32_t crc, const std::byte* buffer,
                  std::byte* dst, Scratch& scratch) {
  const Chunk& chunk = extent.chunks[i];
  if (crc != chunk.crc) throw ChecksumMismatch(extent.file->path(), chunk.offset);
  if (buffer != dst) {
    decode(extent.codec, buffer, chunk.stored_nbytes, dst, chunk.raw_nbytes, scratch);
  }
}

void read_piece(const Extent& extent, size_t i, uint64_t first, uint64_t nbytes, std::byte* dst) {
  extent.file->read(extent.chunks.at(i).offset + first, round_up(nbytes, kIoAlignment), nbytes,
                    dst + first);
}

void check_chunk(const Extent& extent, size_t i, const std::byte* bytes) {
  const Chunk& chunk = extent.chunks.at(i);
  if (crc32c(bytes, chunk.stored_nbytes) != chunk.crc)
    throw ChecksumMismatch(extent.file->path(), chunk.offset);
}

void read_chunk(const Extent& extent, size_t i, std::byte* dst, size_t room, Scratch& scratch) {
  const Chunk& chunk = extent.chunks.at(i);
  const size_t length = round_up(chunk.stored_nbytes, kIoAlignment);
  const bool in_place = lands_in_place(extent, i, dst, room);
  std::byte* buffer = in_place ? dst : scratch.stored.reserve(length);
  extent.file->read(chunk.offset, length, chunk.stored_nbytes, buffer);
  finish_chunk(extent, i, crc32c(buffer, chunk.stored_nbytes), buffer, dst, scratch);
}

void read_chunk(const Extent& extent, size_t i, std::byte* dst, Scratch& scratch) {
  read_chunk(extent, i, dst, round_up(extent.chunks.at(i).raw_nbytes, kIoAlignment), scratch);
}

}  // namespace tiered_mem
