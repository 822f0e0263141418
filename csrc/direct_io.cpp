#include "direct_io.h"

#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <exception>

#include "checksum.h"
#include "error.h"

namespace tiered_mem {
namespace {

// Whether O_DIRECT on `fd` passes the page cache by. tmpfs accepts the flag and has no device.
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

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kIoAlignment == 0; }

// One chunk on its way: read into `buffer`, then verified and, if that isn't its place, decoded.
struct Read {
  const Chunk* chunk;
  std::byte* buffer;
  std::byte* dst;

  size_t nbytes() const { return round_up(chunk->stored_nbytes, kIoAlignment); }
};

bool lands_in_place(const Extent& extent, const Chunk& chunk, const std::byte* dst, size_t room) {
  return extent.codec == Codec::none && is_aligned(dst) &&
         room >= round_up(chunk.stored_nbytes, kIoAlignment);
}

void read_now(const Extent& extent, const Read& read) {
  extent.file->read(read.chunk->offset, read.nbytes(), read.chunk->stored_nbytes, read.buffer);
}

void finish(const Extent& extent, const Read& read, Scratch& scratch) {
  const Chunk& chunk = *read.chunk;
  if (crc32c(read.buffer, chunk.stored_nbytes) != chunk.crc) {
    throw ChecksumMismatch(extent.file->path(), chunk.offset);
  }
  if (read.buffer != read.dst) {
    decode(extent.codec, read.buffer, chunk.stored_nbytes, read.dst, chunk.raw_nbytes, scratch);
  }
}

// Reads in flight on one AIO context. The kernel writes into their buffers until they are done, so
// the destructor waits for every one that was submitted.
class InFlight {
 public:
  explicit InFlight(unsigned long context) : context_(context) {}
  ~InFlight() {
    while (pending_ > 0) wait();
  }

  // Returns how many of the reads, from the first, the kernel took.
  size_t submit(const File& file, const Read* reads, size_t count) {
    std::array<iocb, AsyncReads::kDepth> blocks{};
    std::array<iocb*, AsyncReads::kDepth> pointers;
    for (size_t i = 0; i < count; ++i) {
      iocb& block = blocks[i];
      block.aio_data = i;
      block.aio_lio_opcode = IOCB_CMD_PREAD;
      block.aio_fildes = static_cast<uint32_t>(file.fd());
      block.aio_buf = reinterpret_cast<uintptr_t>(reads[i].buffer);
      block.aio_nbytes = reads[i].nbytes();
      block.aio_offset = static_cast<int64_t>(reads[i].chunk->offset);
      pointers[i] = &block;
    }
    const long taken = syscall(SYS_io_submit, context_, count, pointers.data());
    pending_ = taken > 0 ? static_cast<size_t>(taken) : 0;
    return pending_;
  }

  // Waits for one read; `data` of the result is its place in the submitted list, `res` its bytes.
  io_event wait() {
    io_event event{};
    while (syscall(SYS_io_getevents, context_, 1, 1, &event, nullptr) != 1) {
      if (errno != EINTR) std::terminate();  // the context is ours: the kernel lost our memory
    }
    --pending_;
    return event;
  }

  size_t pending() const { return pending_; }

 private:
  unsigned long context_;
  size_t pending_ = 0;
};

void read_all(const Extent& extent, const Read* reads, size_t count, ReadContext& context) {
  size_t submitted = 0;
  {
    InFlight flight(context.async.context());
    if (extent.file->direct() && context.async.available()) {
      submitted = flight.submit(*extent.file, reads, count);
    }
    while (flight.pending() > 0) {
      const io_event event = flight.wait();
      const Read& read = reads[event.data];
      // Errors and short reads are told apart by reading once more, the plain way.
      if (event.res < static_cast<int64_t>(read.chunk->stored_nbytes)) read_now(extent, read);
      finish(extent, read, context.scratch);
    }
  }
  for (size_t i = submitted; i < count; ++i) {
    read_now(extent, reads[i]);
    finish(extent, reads[i], context.scratch);
  }
}

}  // namespace

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

Extent make_extent(std::shared_ptr<File> file, Codec codec, uint64_t nbytes, uint64_t offset,
                   const uint32_t* table, size_t num_chunks) {
  // zstd adds a few bytes to what it can't compress; anything larger wasn't written by us.
  constexpr size_t kMaxStored = kChunkNbytes + kIoAlignment;
  bool sound = codec <= Codec::zstd_planes2 && offset % kIoAlignment == 0;
  Extent extent{std::move(file), codec, nbytes, {}};
  extent.chunks.reserve(num_chunks);
  uint64_t left = nbytes;
  for (size_t i = 0; i < num_chunks; ++i, table += 3) {
    const Chunk chunk{offset, table[0], table[1], table[2]};
    sound = sound && chunk.raw_nbytes > 0 &&
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

void read_chunk(const Extent& extent, size_t i, std::byte* dst, Scratch& scratch) {
  const Chunk& chunk = extent.chunks.at(i);
  const size_t room = round_up(chunk.raw_nbytes, kIoAlignment);
  Read read{&chunk, dst, dst};
  if (!lands_in_place(extent, chunk, dst, room))
    read.buffer = scratch.stored.reserve(read.nbytes());
  read_now(extent, read);
  finish(extent, read, scratch);
}

AsyncReads::AsyncReads() {
  if (syscall(SYS_io_setup, kDepth, &context_) != 0) context_ = 0;
}

AsyncReads::~AsyncReads() {
  if (context_ != 0) syscall(SYS_io_destroy, context_);
}

void read_block(const Extent& extent, std::byte* dst, size_t room, ReadContext& context) {
  if (room < extent.nbytes) {
    throw ConfigError("a block of " + std::to_string(extent.nbytes) + " bytes does not fit into " +
                      std::to_string(room));
  }
  std::array<Read, AsyncReads::kDepth> reads;
  for (size_t first = 0; first < extent.chunks.size(); first += reads.size()) {
    const size_t count = std::min(reads.size(), extent.chunks.size() - first);
    size_t staged = 0;
    for (size_t k = 0; k < count; ++k) {
      const size_t at = (first + k) * kChunkNbytes;
      reads[k] = {&extent.chunks[first + k], dst + at, dst + at};
      if (!lands_in_place(extent, *reads[k].chunk, dst + at, room - at)) {
        reads[k].buffer = nullptr;
        staged += reads[k].nbytes();
      }
    }
    std::byte* staging = staged ? context.scratch.stored.reserve(staged) : nullptr;
    for (size_t k = 0; k < count; ++k) {
      if (reads[k].buffer) continue;
      reads[k].buffer = staging;
      staging += reads[k].nbytes();
    }
    read_all(extent, reads.data(), count, context);
  }
}

}  // namespace tiered_mem
