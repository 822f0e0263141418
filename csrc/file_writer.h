#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <string>
#include <vector>

namespace tiered_mem {

// Writes to a file past the page cache while its caller makes what comes next. Memory is a ring:
// one part of it is filled while others are on their way (Linux native AIO). What lies one after
// the other, in the ring and in the file, goes together: devices want large writes.
//
// An error waits for `flush`, which ends a batch. Not for several threads at once.
class FileWriter {
 public:
  explicit FileWriter(std::string path);  // makes the file if need be; throws IoError
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  const std::string& path() const { return path_; }
  bool direct() const { return direct_; }  // false: through the page cache

  // Has the disk set these bytes of the file aside, so that a full one says so here.
  // Throws IoError.
  void reserve(uint64_t offset, uint64_t nbytes);
  void truncate(uint64_t nbytes);  // throws IoError

  // Returns memory for blocks of these sizes, to be filled until `write`: one after the other, each
  // aligned. Waits for room.
  std::byte* take(std::vector<size_t> sizes);
  // Begins to write the blocks that were taken, each to its offset, a multiple of kIoAlignment. Up
  // to the next such multiple, zeros follow it.
  void write(const std::vector<uint64_t>& offsets);
  // The same from memory that stays as it is until `wait` for the number this returns. It and the
  // sizes are multiples of kIoAlignment: else throws ConfigError.
  uint64_t write_from(const std::vector<iovec>& blocks, const std::vector<uint64_t>& offsets);
  // Waits until what `write_from` gave this number has left its memory.
  void wait(uint64_t number);
  // Waits until the disk has all that was written. Throws the IoError of the first that failed.
  void flush();
  // Waits until nothing is on its way, whatever became of it.
  void discard();

 private:
  struct Piece {
    std::vector<iovec> parts;  // of memory
    uint64_t number = 0;
    uint64_t offset = 0;  // in the file
    size_t nbytes = 0;
    bool done = false;
  };

  void make_ring(size_t nbytes);
  void free_ring();
  bool busy(const std::byte* start, const std::byte* end) const;
  void extend(std::byte* src, size_t nbytes, uint64_t offset);
  void submit();
  void complete();
  void write_now(const Piece& piece, size_t done);
  void drain();

  std::string path_;
  int fd_ = -1;
  bool direct_ = false;
  unsigned long context_ = 0;  // of AIO; 0 where each write is waited for
  std::byte* ring_ = nullptr;
  size_t ring_nbytes_ = 0;
  size_t head_ = 0;            // where what is taken next begins
  std::vector<size_t> taken_;  // sizes of the blocks at head_
  Piece open_;                 // grows until it is large enough to go
  std::deque<Piece> pieces_;   // that are on their way, oldest first
  uint64_t num_pieces_ = 0;    // ever
  size_t in_flight_ = 0;
  std::exception_ptr error_;
};

}  // namespace tiered_mem
