#include "block_reader.h"

#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <exception>
#include <string>

#include "checksum.h"
#include "error.h"

namespace tiered_mem {
namespace {

// A piece is what one read fetches: a chunk, but the end of a block comes on its own, when most of
// the rest has come. Some devices (virtio among them) report reads that are in flight together as
// done together; held back, the end keeps such a device busy while the rest is verified, and leaves
// little to verify itself.
constexpr size_t kEndNbytes = size_t{256} << 10;
constexpr size_t kDepth = 8;            // pieces in flight
constexpr size_t kWindow = kDepth + 4;  // pieces started and not yet finished
constexpr size_t kSlotNbytes = kChunkNbytes + kIoAlignment;

struct Piece {
  size_t chunk;
  size_t start, nbytes;  // within the stored chunk
  bool last;             // of the block
  bool done;
};

// One block on its way. Pieces are started and finished in order, and may come in any order.
class BlockRead {
 public:
  BlockRead(const Extent& extent, std::byte* dst, size_t room, unsigned long context,
            AlignedBuffer& slots, Scratch& scratch)
      : extent_(extent),
        dst_(dst),
        room_(room),
        context_(context),
        slots_(slots),
        scratch_(scratch),
        next_(piece_at(0, 0)) {}

  // The kernel writes into the buffers until every read is done, whatever was thrown.
  ~BlockRead() {
    while (in_flight_ > 0) wait();
  }

  void run() {
    while (next_.nbytes > 0 || finished_ < started_) {
      start();
      while (!oldest().done) complete();
      start();  // so that the device has work while we compute
      finish(oldest());
      ++finished_;
    }
  }

 private:
  Piece& oldest() { return pieces_[finished_ % kWindow]; }
  std::byte* place_of(size_t chunk) const { return dst_ + chunk * kChunkNbytes; }

  // The piece that begins at `start` of a chunk; one of no bytes behind the block's end.
  Piece piece_at(size_t chunk, size_t start) const {
    const size_t num_chunks = extent_.chunks.size();
    if (chunk == num_chunks) return {};
    const size_t nbytes = extent_.chunks[chunk].stored_nbytes - start;
    if (chunk + 1 < num_chunks) return {chunk, start, nbytes, false, false};
    if (num_chunks == 1 || nbytes <= kEndNbytes) return {chunk, start, nbytes, true, false};
    return {chunk, start, round_up(nbytes - kEndNbytes, kIoAlignment), false, false};
  }

  Piece piece_after(const Piece& piece) const {
    const size_t end = piece.start + piece.nbytes;
    const bool whole = end == extent_.chunks[piece.chunk].stored_nbytes;
    return whole ? piece_at(piece.chunk + 1, 0) : piece_at(piece.chunk, end);
  }

  // A window spans no more than kWindow neighbouring chunks, so none of its chunks share a slot.
  std::byte* buffer_of(const Piece& piece) const {
    std::byte* place = place_of(piece.chunk);
    const size_t room = room_ - piece.chunk * kChunkNbytes;
    if (!lands_in_place(extent_, piece.chunk, place, room)) {
      place = slots_.reserve(kWindow * kSlotNbytes) + piece.chunk % kWindow * kSlotNbytes;
    }
    return place + piece.start;
  }

  // Starts what may be in flight, by one call: devices do reads faster that they are told together.
  void start() {
    std::array<iocb, kDepth> blocks{};
    std::array<iocb*, kDepth> pointers;
    const size_t first = started_;
    size_t count = 0;
    while (next_.nbytes > 0 && in_flight_ + count < kDepth && started_ - finished_ < kWindow &&
           !(next_.last && started_ > 0 && in_flight_ + count == started_)) {
      Piece& piece = pieces_[started_++ % kWindow] = next_;
      next_ = piece_after(piece);
      iocb& block = blocks[count];
      block.aio_data = reinterpret_cast<uintptr_t>(&piece);
      block.aio_lio_opcode = IOCB_CMD_PREAD;
      block.aio_fildes = static_cast<uint32_t>(extent_.file->fd());
      block.aio_buf = reinterpret_cast<uintptr_t>(buffer_of(piece));
      block.aio_nbytes = round_up(piece.nbytes, kIoAlignment);
      block.aio_offset = static_cast<int64_t>(extent_.chunks[piece.chunk].offset + piece.start);
      pointers[count++] = &block;
    }
    if (count == 0) return;
    const long result = syscall(SYS_io_submit, context_, count, pointers.data());
    const size_t taken = result > 0 ? static_cast<size_t>(result) : 0;
    in_flight_ += taken;
    // What the kernel won't take is read the plain way.
    for (size_t i = taken; i < count; ++i) read_now(pieces_[(first + i) % kWindow]);
  }

  io_event wait() {
    io_event event{};
    while (syscall(SYS_io_getevents, context_, 1, 1, &event, nullptr) != 1) {
      // Returning would free memory that the kernel still writes to.
      if (errno != EINTR) std::terminate();
    }
    --in_flight_;
    return event;
  }

  void complete() {
    const io_event event = wait();
    Piece& piece = *reinterpret_cast<Piece*>(event.data);
    piece.done = event.res >= static_cast<int64_t>(piece.nbytes);
    if (!piece.done) read_now(piece);  // meets the error or the short read again, and names it
  }

  void read_now(Piece& piece) {
    extent_.file->read(extent_.chunks[piece.chunk].offset + piece.start,
                       round_up(piece.nbytes, kIoAlignment), piece.nbytes, buffer_of(piece));
    piece.done = true;
  }

  void finish(const Piece& piece) {
    const Chunk& chunk = extent_.chunks[piece.chunk];
    std::byte* buffer = buffer_of(piece);
    crc_ = crc32c(buffer, piece.nbytes, piece.start == 0 ? 0 : crc_);
    if (piece.start + piece.nbytes == chunk.stored_nbytes) {
      finish_chunk(extent_, piece.chunk, crc_, buffer - piece.start, place_of(piece.chunk),
                   scratch_);
    }
  }

  const Extent& extent_;
  std::byte* dst_;
  size_t room_;
  unsigned long context_;
  AlignedBuffer& slots_;  // for chunks that can't land in place
  Scratch& scratch_;
  Piece next_;  // to start
  std::array<Piece, kWindow> pieces_{};
  size_t started_ = 0, finished_ = 0, in_flight_ = 0;
  uint32_t crc_ = 0;  // of the chunk being finished, so far
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
