// A double of a CUDA device, for machines without one: it is no GPU and measures nothing.
//
// Device memory is host memory; each stream is a thread that takes its work in order after random
// delays; events order streams as CUDA's do. It is stricter than a device where that finds
// mistakes:
//
// - every address is checked when work is given and again when it runs; a wrong one is an error
//   that sticks;
// - a copy's target holds poison until its bytes arrive; fresh and freed memory hold poison too;
// - accesses to the same bytes that no event, stream or wait of the host puts in order count as
//   races, whatever order they happened to run in (vector clocks, as in FastTrack, Flanagan and
//   Freund 2009);
// - memory that is freed while work on it is on its way is counted.
//
// Devices share everything but their number and their context.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_driver.h"

namespace cuda_double {

using namespace tiered_mem::cuda;

constexpr CUresult CUDA_ERROR_NOT_INITIALIZED = 3;
constexpr CUresult CUDA_ERROR_INVALID_CONTEXT = 201;
constexpr CUresult CUDA_ERROR_INVALID_HANDLE = 400;
constexpr CUresult CUDA_ERROR_ILLEGAL_ADDRESS = 700;
constexpr CUresult CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713;

constexpr int kFresh = 0xCD, kComing = 0xCE, kFreed = 0xDD;  // poison

/// How much of each stream's work, by the stream's number, comes before a point.
using Clock = std::vector<std::uint64_t>;

/// A point in a stream's work.
struct Point {
  Clock clock;
  bool reached = false;
  std::chrono::steady_clock::time_point when{};
};
using PointPtr = std::shared_ptr<Point>;

enum class Kind { device, host, registered };

/// Memory that the device knows.
struct Range {
  Kind kind;
  std::byte* data;
  std::uint64_t nbytes;
  std::byte* alias;  // where the double reaches it: elsewhere, if the host is kept out
  bool live = true;
  int num_pending = 0;  // pieces of work on it that haven't ended
};
using RangePtr = std::shared_ptr<Range>;

struct Access {
  const std::byte* data;
  std::uint64_t nbytes;
  bool writes;
};

/// Which memory a caller says an address to be of.
enum class Side { device, host, either };

enum class Fate { arrives, fails, hangs };

struct Move {
  std::byte* target;
  const std::byte* source;
  std::uint64_t nbytes;
  Fate fate = Fate::arrives;
  int hang = 0;           // its number among those that hang
  RangePtr to{}, from{};  // null: memory the device doesn't know
};

struct Work {
  std::vector<PointPtr> after;
  std::function<void()> run;
  std::vector<RangePtr> ranges;
  PointPtr done;
};

struct Stream {
  std::size_t number;
  bool blocking;  // in order with the default stream
  bool closing = false;
  Clock clock{};
  PointPtr tail = std::make_shared<Point>(Point{{}, true});
  std::deque<Work> queue{};
  std::condition_variable given{};
  std::mt19937_64 rng{};
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  unsigned flags;
  PointPtr point;
};

/// A kernel with its arguments taken. What it touches is asked for when it runs.
struct Launch {
  std::function<std::vector<Access>()> accesses;
  std::function<void()> run;
};

/// Whether csrc/kernels.cu has a kernel of that name.
bool has_kernel(const std::string& name);
/// Copies the parameters as cuLaunchKernel does.
Launch bind_launch(const std::string& name, unsigned grid, unsigned block, void** parameters);

/// The context that is current on the calling thread.
CUcontext& current_context();

/// The process's machine. Never destroyed: its threads may outlive what is static.
class Machine {
 public:
  Machine();

  // Settings and counts by name: see control.cpp.
  std::int64_t setting(const std::string& name);
  bool set(const std::string& name, std::int64_t value);  // false: there is no such setting
  std::int64_t count(const std::string& name);
  void add(const std::string& name, std::int64_t change = 1);
  void inject(const std::string& function, std::int64_t nth, CUresult code);
  void miss(const std::string& function);
  bool misses(const std::string& function);
  void release_hung();

  CUresult init();
  /// What every function does first: a failure that was asked for, one that sticks, no context.
  CUresult enter(const char* function, bool needs_context = true);

  CUresult allocate(Kind kind, std::uint64_t nbytes, std::byte** data);
  CUresult add_registered(std::byte* data, std::uint64_t nbytes);
  /// Waits for work on it as the driver does; torch's caching allocator doesn't.
  CUresult free(Kind kind, std::byte* data, bool waits);
  bool knows(const std::byte* data, Kind kind);
  std::uint64_t device_nbytes();
  /// Where the host may look at device memory; null for what isn't.
  std::byte* alias(const std::byte* data);

  CUresult create_stream(bool blocking, CUstream* handle);
  CUresult destroy_stream(CUstream handle);
  CUresult query(CUstream handle);
  CUresult synchronize(CUstream handle);
  CUresult synchronize();

  CUresult copy(CUstream stream, std::vector<Move> moves, Side target, Side source, bool waits);
  CUresult fill(CUstream stream, std::byte* target, int value, std::uint64_t nbytes);
  CUresult launch(CUstream stream, Launch launch);

  CUresult create_event(unsigned flags, CUevent* handle);
  CUresult destroy_event(CUevent handle);
  CUresult record(CUevent handle, CUstream stream);
  CUresult hold(CUstream stream, CUevent handle);
  CUresult query(CUevent handle);
  CUresult synchronize(CUevent handle);
  CUresult elapsed(CUevent start, CUevent end, float* milliseconds);

 private:
  using Lock = std::unique_lock<std::mutex>;
  struct Known {
    Access access;
    std::size_t stream;
    PointPtr point;
  };
  struct Injection {
    std::string function;
    std::int64_t nth;
    CUresult code;
  };

  // All of these want the mutex.
  CUresult fail(CUresult code, const std::string& why);
  RangePtr find(const std::byte* data) const;
  bool overlaps(const std::byte* data, std::uint64_t nbytes) const;
  CUresult place(const std::byte* data, std::uint64_t nbytes, Side side, RangePtr& range);
  Stream* stream(CUstream handle);
  Event* event(CUevent handle);
  StreamPtr start_stream(bool blocking);
  PointPtr give(Stream& stream, std::function<void()> run, const std::vector<RangePtr>& ranges,
                const std::vector<Access>& accesses);
  void note(const std::vector<Access>& accesses, std::size_t stream, const PointPtr& point);
  void observe(const Clock& clock);
  CUresult await(Lock& lock, const PointPtr& point);
  static void unmap(const Range& range);

  // These take it.
  void serve(StreamPtr stream);
  void run_copies(Stream& stream, std::vector<Move> moves);
  void run_launch(Stream& stream, const Launch& launch, const PointPtr& point);
  void delay(Stream& stream);

  std::mutex mutex_;
  std::condition_variable changed_;  // a point was reached, work ended, the device failed
  std::map<std::string, std::int64_t> settings_, counts_;
  std::vector<Injection> injections_;
  std::set<std::string> missing_;
  std::atomic<int> pid_{0};
  CUresult error_ = CUDA_SUCCESS;
  int num_hung_ = 0, num_hangs_ = 0, num_released_ = 0;  // now; given; allowed to end
  std::map<const std::byte*, RangePtr> ranges_;
  std::deque<RangePtr> freed_;  // poisoned, and mapped yet
  std::uint64_t device_nbytes_ = 0, host_nbytes_ = 0, freed_nbytes_ = 0;
  std::map<CUstream, StreamPtr> streams_;
  std::size_t num_streams_ = 0;
  std::set<Event*> events_;
  std::vector<Known> known_;  // accesses that the host hasn't seen end
  Clock observed_;            // what it has seen end
};

Machine& machine();

}  // namespace cuda_double
