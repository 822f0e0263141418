#include "file_writer.h"

#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "direct_io.h"
#include "error.h"

namespace tiered_mem {
namespace {

constexpr size_t kPieceNbytes = size_t{1} << 20;  // what one write has at least, if it can
constexpr size_t kDepth = 16;                     // writes in flight
constexpr size_t kMostParts = 256;  // of memory, in one write; the kernel's limit is 1024
constexpr size_t kRingNbytes = size_t{16} << 20;
constexpr size_t kHugeNbytes = size_t{2} << 20;

int open_to_write(const std::string& path, bool direct) {
  const int flags = O_WRONLY | O_CREAT | O_CLOEXEC | (direct ? O_DIRECT : 0);
  return open(path.c_str(), flags, 0600);
}

}  // namespace

FileWriter::FileWriter(std::string path) : path_(std::move(path)) {
  fd_ = open_to_write(path_, true);
  direct_ = fd_ >= 0 && bypasses_page_cache(fd_);
  if (!direct_) {
    if (fd_ >= 0) close(fd_);
    fd_ = open_to_write(path_, false);
    if (fd_ < 0) throw IoError(errno, path_, 0, "opening");
  }
  if (direct_ && syscall(SYS_io_setup, kDepth, &context_) != 0) context_ = 0;
}

FileWriter::~FileWriter() {
  discard();
  if (context_ != 0) syscall(SYS_io_destroy, context_);
  free_ring();
  close(fd_);
}

void FileWriter::reserve(uint64_t offset, uint64_t nbytes) {
  int result;
  do {
    result = fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(nbytes));
  } while (result != 0 && errno == EINTR);
  // Where a filesystem can't, a full disk shows when it is written to.
  if (result != 0 && errno != EOPNOTSUPP) throw IoError(errno, path_, offset, "making room in");
}

void FileWriter::truncate(uint64_t nbytes) {
  if (ftruncate(fd_, static_cast<off_t>(nbytes)) != 0) {
    throw IoError(errno, path_, nbytes, "cutting");
  }
}

std::byte* FileWriter::take(std::vector<size_t> sizes) {
  size_t length = 0;
  for (size_t nbytes : sizes) length += round_up(nbytes, kIoAlignment);
  // So that pieces are on their way while the next is made.
  if (2 * length > ring_nbytes_) make_ring(std::max(kRingNbytes, 2 * length));
  if (head_ + length > ring_nbytes_) {
    submit();
    head_ = 0;
  }
  while (busy(ring_ + head_, ring_ + head_ + length)) complete();
  taken_ = std::move(sizes);
  return ring_ + head_;
}

void FileWriter::write(const std::vector<uint64_t>& offsets) {
  if (offsets.size() != taken_.size()) throw ConfigError("each block that was taken has an offset");
  for (size_t i = 0; i < offsets.size(); ++i) {
    const size_t length = round_up(taken_[i], kIoAlignment);
    std::memset(ring_ + head_ + taken_[i], 0, length - taken_[i]);
    extend(ring_ + head_, length, offsets[i]);
    head_ += length;
  }
  taken_.clear();
}

uint64_t FileWriter::write_from(const std::vector<iovec>& blocks,
                                const std::vector<uint64_t>& offsets) {
  if (offsets.size() != blocks.size()) throw ConfigError("each block has an offset");
  for (const iovec& block : blocks) {
    if (reinterpret_cast<uintptr_t>(block.iov_base) % kIoAlignment || block.iov_len % kIoAlignment)
      throw ConfigError("O_DIRECT writes from aligned memory: copy the block");
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    extend(static_cast<std::byte*>(blocks[i].iov_base), blocks[i].iov_len, offsets[i]);
  }
  return num_pieces_;
}

void FileWriter::wait(uint64_t number) {
  if (open_.nbytes > 0 && open_.number <= number) submit();
  while (!pieces_.empty() && pieces_.front().number <= number) complete();
}

// Adds bytes to the open piece, if they follow it in the file.
void FileWriter::extend(std::byte* src, size_t nbytes, uint64_t offset) {
  if (offset != open_.offset + open_.nbytes || open_.parts.size() == kMostParts) submit();
  if (open_.nbytes == 0) {
    open_.offset = offset;
    open_.number = ++num_pieces_;
  }
  std::vector<iovec>& parts = open_.parts;
  const bool follows = !parts.empty() &&
                       static_cast<std::byte*>(parts.back().iov_base) + parts.back().iov_len == src;
  if (follows)
    parts.back().iov_len += nbytes;
  else
    parts.push_back({src, nbytes});
  open_.nbytes += nbytes;
  if (open_.nbytes >= kPieceNbytes) submit();
}

void FileWriter::flush() {
  submit();
  drain();
  if (!error_ && fdatasync(fd_) != 0) {
    error_ = std::make_exception_ptr(IoError(errno, path_, 0, "writing"));
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void FileWriter::discard() {
  open_ = {};
  drain();
  error_ = nullptr;
}

void FileWriter::make_ring(size_t nbytes) {
  submit();
  drain();
  free_ring();
  nbytes = round_up(nbytes, kHugeNbytes);
  void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // O_DIRECT names every page to the device: fewer of them are faster. Without, only speed is lost.
  madvise(memory, nbytes, MADV_HUGEPAGE);
  ring_ = static_cast<std::byte*>(memory);
  ring_nbytes_ = nbytes;
}

void FileWriter::free_ring() {
  if (ring_ != nullptr) munmap(ring_, ring_nbytes_);
  ring_ = nullptr;
  ring_nbytes_ = head_ = 0;
}

// Whether any of these bytes of the ring are still to be written.
bool FileWriter::busy(const std::byte* start, const std::byte* end) const {
  return std::any_of(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
    return std::any_of(piece.parts.begin(), piece.parts.end(), [&](const iovec& part) {
      const auto* first = static_cast<const std::byte*>(part.iov_base);
      return first < end && start < first + part.iov_len;
    });
  });
}

// Sends the open piece on its way.
void FileWriter::submit() {
  if (open_.nbytes == 0) return;
  if (context_ == 0) return write_now(std::exchange(open_, {}), 0);
  while (in_flight_ == kDepth) complete();
  pieces_.push_back(std::exchange(open_, {}));  // a deque: the others stay where they are
  Piece& piece = pieces_.back();
  iocb block{};
  block.aio_data = reinterpret_cast<uintptr_t>(&piece);
  block.aio_lio_opcode = IOCB_CMD_PWRITEV;
  block.aio_fildes = static_cast<uint32_t>(fd_);
  block.aio_buf = reinterpret_cast<uintptr_t>(piece.parts.data());
  block.aio_nbytes = piece.parts.size();
  block.aio_offset = static_cast<int64_t>(piece.offset);
  iocb* pointer = &block;
  if (syscall(SYS_io_submit, context_, 1, &pointer) == 1) {
    ++in_flight_;
    return;
  }
  write_now(piece, 0);  // what the kernel won't take is written the plain way
  pieces_.pop_back();
}

// Waits for one write.
void FileWriter::complete() {
  io_event event{};
  while (syscall(SYS_io_getevents, context_, 1, 1, &event, nullptr) != 1) {
    // Going on would reuse memory that the kernel still reads from.
    if (errno != EINTR) std::terminate();
  }
  --in_flight_;
  Piece& piece = *reinterpret_cast<Piece*>(event.data);
  const size_t done = event.res < 0 ? 0 : static_cast<size_t>(event.res);
  if (done < piece.nbytes) write_now(piece, done);  // meets the error again, and names it
  piece.done = true;
  while (!pieces_.empty() && pieces_.front().done) pieces_.pop_front();
}

// Writes what is left of a piece, of which `done` bytes are written.
void FileWriter::write_now(const Piece& piece, size_t done) {
  uint64_t offset = piece.offset;
  for (const iovec& part : piece.parts) {
    size_t first = std::min(done, part.iov_len);
    done -= first;
    offset += first;
    while (first < part.iov_len && !error_) {
      const auto* src = static_cast<const std::byte*>(part.iov_base) + first;
      const ssize_t count = pwrite(fd_, src, part.iov_len - first, static_cast<off_t>(offset));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {
        const int reason = count < 0 ? errno : ENOSPC;
        error_ = std::make_exception_ptr(IoError(reason, path_, offset, "writing"));
        return;
      }
      first += static_cast<size_t>(count);
      offset += static_cast<uint64_t>(count);
    }
  }
}

void FileWriter::drain() {
  while (in_flight_ > 0) complete();
}

}  // namespace tiered_mem
