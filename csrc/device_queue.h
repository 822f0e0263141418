// A device whose copies somebody else makes: threads of Python's, with torch's accelerator API.
//
// The I/O threads only put commands on a queue here, so none of them ever takes the GIL. A thread
// for each direction takes the commands in order, copies, and says which have arrived.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"

namespace tiered_mem {

class QueueDevice final : public Device {
 public:
  /// Copies to make once the compute at `points` is done; none: only tell when that is.
  struct Command {
    std::uint64_t id;
    std::vector<Copy> copies;
    std::vector<Compute> points;
  };

  QueueDevice() = default;
  ~QueueDevice() override;

  /// Throws DeviceError: a tier's memory comes in segments.
  std::shared_ptr<Memory> allocate(std::uint64_t nbytes) override;
  /// From what `add_pinned` told of, as long as that lasts.
  std::shared_ptr<Memory> allocate_staging(std::uint64_t nbytes) override;
  bool host_accessible() const override { return false; }
  bool asynchronous() const override { return true; }
  MarkPtr copy_async(Direction direction, const std::vector<Copy>& copies,
                     const std::vector<MarkPtr>& after) override;
  bool reached(const MarkPtr& mark) override;
  void wait(const MarkPtr& mark) override;
  /// `compute` names a point that the taker of the commands knows. 0: all work until now.
  MarkPtr mark_compute(Compute compute) override;
  bool reaches(const std::byte* host, std::uint64_t nbytes) const override;
  /// Throws DeviceError: there is no portable way to pin memory that exists.
  std::shared_ptr<void> pin(std::byte* host, std::uint64_t nbytes) override;

  // For those who make the copies.

  /// Page-locked host memory to stage in, alive as long as `owner`.
  void add_pinned(std::byte* data, std::uint64_t nbytes, std::shared_ptr<void> owner);
  /// The next commands of a direction, in order, whose predecessors in the other direction have
  /// arrived. Waits for one; empty once the device is closed.
  std::vector<Command> take(Direction direction);
  void complete(std::uint64_t id);
  void fail(std::uint64_t id, const std::string& message);
  /// Points that no mark names any more, since the last call.
  std::vector<Compute> take_forgotten();
  /// Fails what is under way and all that comes.
  void close(const std::string& message);

 private:
  enum class State : std::uint8_t { waiting, reached, failed };
  struct Arrival;
  struct Point;
  struct Forgotten;
  struct Queued {
    Command command;
    std::vector<MarkPtr> after;
  };
  struct Pinned;
  struct Open {
    std::shared_ptr<Arrival> arrival;
    std::vector<MarkPtr> points;  // what the taker mustn't forget yet
  };

  std::shared_ptr<const Arrival> enqueue(Direction direction, std::vector<Copy> copies,
                                         std::vector<MarkPtr> after);
  std::shared_ptr<const Arrival> arrival_of(const MarkPtr& mark);
  State progress(Direction direction, Queued& queued, std::string& error);
  bool take_ready(Direction direction, std::vector<Command>& commands);
  void settle(std::uint64_t id, State state, const std::string& error);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::array<std::deque<Queued>, 2> queues_;
  std::unordered_map<std::uint64_t, Open> open_;
  std::uint64_t last_id_ = 0;
  bool closed_ = false;
  std::string closed_why_;
  std::shared_ptr<Forgotten> forgotten_ = make_forgotten();
  std::shared_ptr<Pinned> pinned_;

  static std::shared_ptr<Forgotten> make_forgotten();
};

}  // namespace tiered_mem
