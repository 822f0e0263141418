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
constexpr size_t kDepth = 8;                      // writes in flight
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
  if (4 * length > ring_nbytes_) make_ring(std::max(kRingNbytes, 4 * length));
  if (head_ + length > ring_nbytes_) {
    submit();
    head_ = 0;
  }
  while (busy(head_, head_ + length)) complete();
  taken_ = std::move(sizes);
  return ring_ + head_;
}

void FileWriter::write(const std::vector<uint64_t>& offsets) {
  if (offsets.size() != taken_.size()) throw ConfigError("as many offsets as blocks were taken");
  for (size_t i = 0; i < offsets.size(); ++i) {
    const size_t length = round_up(taken_[i], kIoAlignment);
    std::memset(ring_ + head_ + taken_[i], 0, length - taken_[i]);
    extend(length, offsets[i]);
  }
  taken_.clear();
}

// Adds what lies at head_ to the open piece, if it follows it in the file too.
void FileWriter::extend(size_t length, uint64_t offset) {
  const bool follows = head_ == open_.start + open_.nbytes && offset == open_.offset + open_.nbytes;
  if (!follows) submit();
  if (open_.nbytes == 0) open_ = Piece{head_, 0, offset};
  open_.nbytes += length;
  head_ += length;
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
bool FileWriter::busy(size_t start, size_t end) const {
  return std::any_of(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
    return piece.start < end && start < piece.start + piece.nbytes;
  });
}

// Sends the open piece on its way.
void FileWriter::submit() {
  if (open_.nbytes == 0) return;
  const Piece piece = std::exchange(open_, {});
  if (context_ == 0) return write_now(piece, 0);
  while (in_flight_ == kDepth) complete();
  pieces_.push_back(piece);  // a deque: the others stay where the kernel knows them
  iocb block{};
  block.aio_data = reinterpret_cast<uintptr_t>(&pieces_.back());
  block.aio_lio_opcode = IOCB_CMD_PWRITE;
  block.aio_fildes = static_cast<uint32_t>(fd_);
  block.aio_buf = reinterpret_cast<uintptr_t>(ring_ + piece.start);
  block.aio_nbytes = piece.nbytes;
  block.aio_offset = static_cast<int64_t>(piece.offset);
  iocb* pointer = &block;
  if (syscall(SYS_io_submit, context_, 1, &pointer) == 1) {
    ++in_flight_;
    return;
  }
  pieces_.pop_back();  // what the kernel won't take is written the plain way
  write_now(piece, 0);
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

void FileWriter::write_now(const Piece& piece, size_t done) {
  while (done < piece.nbytes && !error_) {
    const ssize_t count = pwrite(fd_, ring_ + piece.start + done, piece.nbytes - done,
                                 static_cast<off_t>(piece.offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      const int reason = count < 0 ? errno : ENOSPC;
      error_ = std::make_exception_ptr(IoError(reason, path_, piece.offset + done, "writing"));
      return;
    }
    done += static_cast<size_t>(count);
  }
}

void FileWriter::drain() {
  while (in_flight_ > 0) complete();
}

}  // namespace tiered_mem
