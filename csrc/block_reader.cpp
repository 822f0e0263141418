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

// A piece is what one read fetches: at most a chunk and half of what is left of the block, so that
// little is left to verify when the last one has come. Some devices (virtio among them) report
// reads that are in flight together as done together, so fewer may be in flight than a block has.
constexpr size_t kLeastPieceNbytes = size_t{256} << 10;
constexpr size_t kDepth = 3;
constexpr size_t kWindow = 2 * kDepth;  // pieces submitted and not yet consumed
constexpr size_t kSlotNbytes = kChunkNbytes + kIoAlignment;

struct Piece {
  size_t chunk;
  size_t start, nbytes;  // within the stored chunk
  std::byte* buffer;
  bool done;
};

// One block on its way. Pieces are submitted and consumed in order, and may come in any order.
class BlockRead {
 public:
  BlockRead(const Extent& extent, std::byte* dst, size_t room, unsigned long context,
            Scratch& scratch)
      : extent_(extent), dst_(dst), room_(room), scratch_(scratch) {
    if (extent.file->direct()) context_ = context;
    for (const Chunk& chunk : extent.chunks) left_ += chunk.stored_nbytes;
  }

  // The kernel writes into the buffers until every read is done, whatever was thrown.
  ~BlockRead() {
    while (in_flight_ > 0) wait();
  }

  void run() {
    while (consumed_ < submitted_ || next_chunk_ < extent_.chunks.size()) {
      submit();
      Piece& piece = pieces_[consumed_ % kWindow];
      if (!piece.done) {
        complete(wait());
        continue;  // so that the device has its next read before we compute
      }
      consume(piece);
      ++consumed_;
    }
  }

 private:
  void submit() {
    const size_t depth = context_ ? kDepth : 1;
    while (in_flight_ < depth && submitted_ - consumed_ < std::min(depth * 2, kWindow) &&
           next_chunk_ < extent_.chunks.size()) {
      Piece& piece = pieces_[submitted_++ % kWindow];
      piece = next_piece();
      if (context_ && start(piece)) continue;
      read_now(piece);
      if (!context_) return;
    }
  }

  Piece next_piece() {
    const size_t chunk_left = extent_.chunks[next_chunk_].stored_nbytes - next_start_;
    const size_t most = std::max(kLeastPieceNbytes, round_up(left_ / 2, kIoAlignment));
    const Piece piece{next_chunk_, next_start_, std::min(chunk_left, most),
                      buffer_of(next_chunk_) + next_start_, false};
    left_ -= piece.nbytes;
    next_start_ += piece.nbytes;
    if (piece.nbytes == chunk_left) {
      ++next_chunk_;
      next_start_ = 0;
    }
    return piece;
  }

  std::byte* place_of(size_t chunk) const { return dst_ + chunk * kChunkNbytes; }

  bool in_place(size_t chunk) const {
    return lands_in_place(extent_, extent_.chunks[chunk], place_of(chunk),
                          room_ - chunk * kChunkNbytes);
  }

  // No two of kWindow neighbouring chunks share a slot, and a window spans no more than these.
  std::byte* buffer_of(size_t chunk) {
    if (in_place(chunk)) return place_of(chunk);
    return scratch_.stored.reserve(kWindow * kSlotNbytes) + chunk % kWindow * kSlotNbytes;
  }

  bool start(Piece& piece) {
    iocb block{};
    block.aio_data = reinterpret_cast<uintptr_t>(&piece);
    block.aio_lio_opcode = IOCB_CMD_PREAD;
    block.aio_fildes = static_cast<uint32_t>(extent_.file->fd());
    block.aio_buf = reinterpret_cast<uintptr_t>(piece.buffer);
    block.aio_nbytes = round_up(piece.nbytes, kIoAlignment);
    block.aio_offset = static_cast<int64_t>(extent_.chunks[piece.chunk].offset + piece.start);
    iocb* blocks[] = {&block};
    if (syscall(SYS_io_submit, context_, 1, blocks) != 1) return false;
    ++in_flight_;
    return true;
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

  void complete(const io_event& event) {
    Piece& piece = *reinterpret_cast<Piece*>(event.data);
    piece.done = true;
    // An error or a short read is met again, and named, by reading the plain way.
    if (event.res < static_cast<int64_t>(piece.nbytes)) read_now(piece);
  }

  void read_now(Piece& piece) {
    extent_.file->read(extent_.chunks[piece.chunk].offset + piece.start,
                       round_up(piece.nbytes, kIoAlignment), piece.nbytes, piece.buffer);
    piece.done = true;
  }

  void consume(const Piece& piece) {
    const Chunk& chunk = extent_.chunks[piece.chunk];
    crc_ = crc32c(piece.buffer, piece.nbytes, piece.start == 0 ? 0 : crc_);
    if (piece.start + piece.nbytes < chunk.stored_nbytes) return;
    if (crc_ != chunk.crc) throw ChecksumMismatch(extent_.file->path(), chunk.offset);
    if (!in_place(piece.chunk)) {
      decode(extent_.codec, piece.buffer - piece.start, chunk.stored_nbytes, place_of(piece.chunk),
             chunk.raw_nbytes, scratch_);
    }
  }

  const Extent& extent_;
  std::byte* dst_;
  size_t room_;
  Scratch& scratch_;
  unsigned long context_ = 0;  // 0: read each piece in turn
  std::array<Piece, kWindow> pieces_{};
  size_t next_chunk_ = 0, next_start_ = 0;  // what to submit next
  size_t left_ = 0;                         // bytes not yet submitted
  size_t submitted_ = 0, consumed_ = 0;     // pieces so far
  size_t in_flight_ = 0;
  uint32_t crc_ = 0;  // of the chunk being consumed, so far
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
  BlockRead(extent, dst, room, context_, scratch_).run();
}

}  // namespace tiered_mem
