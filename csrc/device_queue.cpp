#include "device_queue.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "error.h"

namespace tiered_mem {

namespace {

constexpr std::size_t kMostAtOnce = 32;
constexpr std::uint64_t kStagingAlignment = 4096;

std::size_t index_of(Direction direction) { return static_cast<std::size_t>(direction); }

}  // namespace

/// The arrival of a command's copies. Its state is guarded by the device's mutex.
struct QueueDevice::Arrival final : Mark {
  Arrival(std::uint64_t id, Direction direction) : id(id), direction(direction) {}
  const std::uint64_t id;
  const Direction direction;
  State state = State::waiting;
  std::string error;
};

struct QueueDevice::Forgotten {
  std::mutex mutex;
  std::vector<Compute> points;
};

/// A point in the caller's compute. Only whoever makes the copies can tell whether it is reached:
/// the first who wants to know it sends a command without copies.
struct QueueDevice::Point final : Mark {
  Point(Compute id, std::shared_ptr<Forgotten> forgotten)
      : id(id), forgotten(std::move(forgotten)) {}
  ~Point() override {
    const std::lock_guard lock(forgotten->mutex);
    forgotten->points.push_back(id);
  }
  const Compute id;
  const std::shared_ptr<Forgotten> forgotten;
  mutable std::shared_ptr<const Arrival> arrival;  // guarded by the device's mutex
};

/// Page-locked memory and the ranges of it that are given away.
struct QueueDevice::Pinned {
  class Range final : public Memory {
   public:
    Range(std::shared_ptr<Pinned> from, std::uint64_t first, std::uint64_t nbytes)
        : from_(std::move(from)), first_(first), nbytes_(nbytes) {}
    ~Range() override {
      const std::lock_guard lock(from_->mutex);
      from_->taken.erase(first_);
    }
    std::byte* data() const override { return from_->data + first_; }
    std::uint64_t nbytes() const override { return nbytes_; }

   private:
    std::shared_ptr<Pinned> from_;
    std::uint64_t first_, nbytes_;
  };

  static std::shared_ptr<Memory> allocate(const std::shared_ptr<Pinned>& from,
                                          std::uint64_t nbytes) {
    const std::uint64_t room =
        (nbytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
    const std::lock_guard lock(from->mutex);
    std::uint64_t first = 0;
    for (const auto& [taken, size] : from->taken) {
      if (taken - first >= room) break;
      first = taken + size;
    }
    if (room == 0 || room > from->nbytes || first > from->nbytes - room) return nullptr;
    from->taken[first] = room;
    return std::make_shared<Range>(from, first, nbytes);
  }

  std::mutex mutex;
  std::byte* data;
  std::uint64_t nbytes;
  std::shared_ptr<void> owner;
  std::map<std::uint64_t, std::uint64_t> taken;  // first byte -> nbytes
};

std::shared_ptr<QueueDevice::Forgotten> QueueDevice::make_forgotten() {
  return std::make_shared<Forgotten>();
}

QueueDevice::~QueueDevice() { close("the device is gone"); }

std::shared_ptr<Memory> QueueDevice::allocate(std::uint64_t) {
  throw DeviceError("the memory of this device comes in segments that torch allocates");
}

std::shared_ptr<Memory> QueueDevice::allocate_staging(std::uint64_t nbytes) {
  std::shared_ptr<Pinned> pinned;
  {
    const std::lock_guard lock(mutex_);
    pinned = pinned_;
  }
  if (pinned)
    if (auto memory = Pinned::allocate(pinned, nbytes)) return memory;
  return make_host_device()->allocate(nbytes);
}

void QueueDevice::add_pinned(std::byte* data, std::uint64_t nbytes, std::shared_ptr<void> owner) {
  auto pinned = std::make_shared<Pinned>();
  const auto skipped =
      (kStagingAlignment - reinterpret_cast<std::uintptr_t>(data)) & (kStagingAlignment - 1);
  if (nbytes <= skipped) throw ConfigError("page-locked memory of less than a page is no use");
  pinned->data = data + skipped;
  pinned->nbytes = nbytes - skipped;
  pinned->owner = std::move(owner);
  const std::lock_guard lock(mutex_);
  if (pinned_) throw ConfigError("this device has its page-locked memory already");
  pinned_ = std::move(pinned);
}

// Without page-locked memory nothing is gained by staging: every copy is as slow.
bool QueueDevice::reaches(const std::byte* host, std::uint64_t nbytes) const {
  const std::lock_guard lock(mutex_);
  if (!pinned_) return true;
  return host >= pinned_->data && host + nbytes <= pinned_->data + pinned_->nbytes;
}

std::shared_ptr<void> QueueDevice::pin(std::byte*, std::uint64_t) {
  throw DeviceError("torch's accelerator API can't page-lock memory that exists");
}

MarkPtr QueueDevice::copy_async(Direction direction, const std::vector<Copy>& copies,
                                const std::vector<MarkPtr>& after) {
  const std::lock_guard lock(mutex_);
  if (closed_) throw TransferError(closed_why_);
  return enqueue(direction, copies, after);
}

std::shared_ptr<const QueueDevice::Arrival> QueueDevice::enqueue(Direction direction,
                                                                 std::vector<Copy> copies,
                                                                 std::vector<MarkPtr> after) {
  auto arrival = std::make_shared<Arrival>(++last_id_, direction);
  open_[arrival->id].arrival = arrival;
  queues_[index_of(direction)].push_back({{arrival->id, std::move(copies), {}}, std::move(after)});
  changed_.notify_all();
  return arrival;
}

MarkPtr QueueDevice::mark_compute(Compute compute) {
  return std::make_shared<Point>(compute, forgotten_);
}

std::shared_ptr<const QueueDevice::Arrival> QueueDevice::arrival_of(const MarkPtr& mark) {
  if (auto arrival = std::dynamic_pointer_cast<const Arrival>(mark)) return arrival;
  const auto point = std::dynamic_pointer_cast<const Point>(mark);
  if (!point) throw TransferError("a mark of another device");
  if (!point->arrival) {
    if (closed_) throw TransferError(closed_why_);
    point->arrival = enqueue(Direction::out, {}, {mark});
  }
  return point->arrival;
}

bool QueueDevice::reached(const MarkPtr& mark) {
  if (!mark) return true;
  const std::lock_guard lock(mutex_);
  const auto arrival = arrival_of(mark);
  if (arrival->state == State::failed) throw TransferError(arrival->error);
  return arrival->state == State::reached;
}

void QueueDevice::wait(const MarkPtr& mark) {
  if (!mark) return;
  std::unique_lock lock(mutex_);
  const auto arrival = arrival_of(mark);
  changed_.wait(lock, [&] { return arrival->state != State::waiting; });
  if (arrival->state == State::failed) throw TransferError(arrival->error);
}

// Whether a command may be taken (reached), has to wait, or can't be made (failed). What the other
// direction has to bring first is waited for here; one direction keeps its order by itself.
QueueDevice::State QueueDevice::progress(Direction direction, Queued& queued, std::string& error) {
  while (!queued.after.empty()) {
    const MarkPtr& mark = queued.after.back();
    if (const auto* arrival = dynamic_cast<const Arrival*>(mark.get())) {
      if (arrival->state == State::failed) {
        error = "a copy that had to come first failed: " + arrival->error;
        return State::failed;
      }
      if (arrival->state == State::waiting && arrival->direction != direction)
        return State::waiting;
    } else if (const auto* point = dynamic_cast<const Point*>(mark.get())) {
      queued.command.points.push_back(point->id);
      open_[queued.command.id].points.push_back(mark);
    } else if (mark) {
      error = "a mark of another device";
      return State::failed;
    }
    queued.after.pop_back();
  }
  return State::reached;
}

bool QueueDevice::take_ready(Direction direction, std::vector<Command>& commands) {
  auto& queue = queues_[index_of(direction)];
  while (!queue.empty() && commands.size() < kMostAtOnce) {
    std::string error;
    const State state = progress(direction, queue.front(), error);
    if (state == State::waiting) break;
    Queued queued = std::move(queue.front());
    queue.pop_front();
    if (state == State::failed)
      settle(queued.command.id, State::failed, error);
    else
      commands.push_back(std::move(queued.command));
  }
  return !commands.empty();
}

std::vector<QueueDevice::Command> QueueDevice::take(Direction direction) {
  std::vector<Command> commands;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return closed_ || take_ready(direction, commands); });
  return commands;
}

void QueueDevice::settle(std::uint64_t id, State state, const std::string& error) {
  const auto found = open_.find(id);
  if (found == open_.end()) return;  // closed meanwhile
  found->second.arrival->state = state;
  found->second.arrival->error = error;
  open_.erase(found);
  changed_.notify_all();
}

void QueueDevice::complete(std::uint64_t id) {
  const std::lock_guard lock(mutex_);
  settle(id, State::reached, "");
}

void QueueDevice::fail(std::uint64_t id, const std::string& message) {
  const std::lock_guard lock(mutex_);
  settle(id, State::failed, message);
}

std::vector<Compute> QueueDevice::take_forgotten() {
  const std::lock_guard lock(forgotten_->mutex);
  return std::exchange(forgotten_->points, {});
}

void QueueDevice::close(const std::string& message) {
  const std::lock_guard lock(mutex_);
  if (closed_) return;
  closed_ = true;
  closed_why_ = message;
  for (auto& queue : queues_) queue.clear();
  for (auto& [id, open] : open_) {
    open.arrival->state = State::failed;
    open.arrival->error = message;
  }
  open_.clear();
  changed_.notify_all();
}

}  // namespace tiered_mem
