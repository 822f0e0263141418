#include "block_reader.h"

#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <exception>
#include <string>

#include "error.h"

namespace tiered_mem {
namespace {

constexpr size_t kDepth = 8;  // chunks in flight
constexpr size_t kSlotNbytes = kChunkNbytes + kIoAlignment;

// One block on its way: every slot holds a chunk that is in flight, or none.
class BlockRead {
 public:
  BlockRead(const Extent& extent, std::byte* dst, size_t room, unsigned long context,
            AlignedBuffer& slots, Scratch& scratch)
      : extent_(extent),
        dst_(dst),
        room_(room),
        context_(context),
        slots_(slots),
        scratch_(scratch) {
    for (size_t slot = 0; slot < kDepth; ++slot) free_[slot] = slot;
  }

  // The kernel writes into the buffers until every read is done, whatever was thrown.
  ~BlockRead() {
    while (num_free_ < kDepth) wait();
  }

  void run() {
    for (start(); num_free_ < kDepth; start()) {
      const io_event event = wait();
      const size_t chunk = chunks_[event.data];
      if (event.res >= static_cast<int64_t>(extent_.chunks[chunk].stored_nbytes)) {
        finish_chunk(extent_, chunk, buffer_of(chunk, event.data), place_of(chunk), scratch_);
      } else {
        read_plainly(chunk);  // meets the error or the short read again, and names it
      }
    }
  }

 private:
  std::byte* place_of(size_t chunk) const { return dst_ + chunk * kChunkNbytes; }
  size_t room_of(size_t chunk) const { return room_ - chunk * kChunkNbytes; }

  std::byte* buffer_of(size_t chunk, size_t slot) const {
    if (lands_in_place(extent_, chunk, place_of(chunk), room_of(chunk))) return place_of(chunk);
    return slots_.reserve(kDepth * kSlotNbytes) + slot * kSlotNbytes;
  }

  // Puts a chunk into every free slot by one call: a device does reads faster when it is told of
  // many at once. Chunks that the kernel won't take are read the plain way.
  void start() {
    std::array<iocb, kDepth> blocks{};
    std::array<iocb*, kDepth> pointers;
    const size_t count = std::min(num_free_, extent_.chunks.size() - next_);
    for (size_t i = 0; i < count; ++i) {
      const size_t slot = free_[num_free_ - 1 - i];
      const Chunk& chunk = extent_.chunks[next_ + i];
      chunks_[slot] = next_ + i;
      iocb& block = blocks[i];
      block.aio_data = slot;
      block.aio_lio_opcode = IOCB_CMD_PREAD;
      block.aio_fildes = static_cast<uint32_t>(extent_.file->fd());
      block.aio_buf = reinterpret_cast<uintptr_t>(buffer_of(next_ + i, slot));
      block.aio_nbytes = round_up(chunk.stored_nbytes, kIoAlignment);
      block.aio_offset = static_cast<int64_t>(chunk.offset);
      pointers[i] = &block;
    }
    if (count == 0) return;
    const long taken = syscall(SYS_io_submit, context_, count, pointers.data());
    if (taken > 0) {
      num_free_ -= static_cast<size_t>(taken);
      next_ += static_cast<size_t>(taken);
    } else {
      while (next_ < extent_.chunks.size()) read_plainly(next_++);
    }
  }

  // Waits for one read. Its slot counts as free from then on: use it before the next start().
  io_event wait() {
    io_event event{};
    while (syscall(SYS_io_getevents, context_, 1, 1, &event, nullptr) != 1) {
      // Returning would free memory that the kernel still writes to.
      if (errno != EINTR) std::terminate();
    }
    free_[num_free_++] = event.data;
    return event;
  }

  void read_plainly(size_t chunk) {
    read_chunk(extent_, chunk, place_of(chunk), room_of(chunk), scratch_);
  }

  const Extent& extent_;
  std::byte* dst_;
  size_t room_;
  unsigned long context_;
  AlignedBuffer& slots_;  // for chunks that can't land in place
  Scratch& scratch_;
  size_t next_ = 0;                      // chunk to start next
  std::array<size_t, kDepth> chunks_{};  // by slot
  std::array<size_t, kDepth> free_{};    // the free slots are its first num_free_
  size_t num_free_ = kDepth;
};

}  // namespace

BlockReader::BlockReader() {
  if (syscall(SYS_io_setup, kDepth, &context_) != 0) context_ = 0;
}

BlockReader::~BlockReader() {
  if (context_ != 0) syscall(SYS_io_destroy, context_);
}

void BlockReader::read(const Extent& extent, std::byte* dst, size_t room) {
  if (room < extent.nbytes) {
    throw ConfigError("a block of " + std::to_string(extent.nbytes) + " bytes does not fit into " +
                      std::to_string(room));
  }
  if (context_ != 0 && extent.file->direct()) {
    BlockRead(extent, dst, room, context_, slots_, scratch_).run();
    return;
  }
  for (size_t i = 0; i < extent.chunks.size(); ++i) {
    read_chunk(extent, i, dst + i * kChunkNbytes, room - i * kChunkNbytes, scratch_);
  }
}

}  // namespace tiered_mem
