// A device on a queue, with a thread of C++ where the package has one of Python's.
#include "device_queue.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using namespace tiered_mem;

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

template <typename Expected>
bool throws(const std::function<void()>& call) {
  try {
    call();
  } catch (const Expected&) {
    return true;
  }
  return false;
}

using Bytes = std::vector<std::byte>;

Copy copy_of(Bytes& target, const Bytes& source) {
  return {target.data(), source.data(), source.size()};
}

// Makes what is on the queue, one command a call.
std::size_t serve_once(QueueDevice& device, Direction direction) {
  const auto commands = device.take(direction);
  for (const auto& command : commands) {
    for (const Copy& copy : command.copies) std::memcpy(copy.target, copy.source, copy.nbytes);
    device.complete(command.id);
  }
  return commands.size();
}

// Two threads that copy until the device is closed.
class Servants {
 public:
  explicit Servants(QueueDevice& device) : device_(device) {
    for (const Direction direction : {Direction::in, Direction::out})
      threads_.emplace_back([this, direction] {
        while (serve_once(device_, direction) > 0) {
        }
      });
  }
  ~Servants() {
    device_.close("closed");
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  QueueDevice& device_;
  std::vector<std::thread> threads_;
};

void copies_arrive_in_order() {
  QueueDevice device;
  const Servants servants(device);
  const Bytes first(4096, std::byte{1}), second(4096, std::byte{2});
  Bytes target(4096), back(4096);
  device.copy_async(Direction::in, {copy_of(target, first)}, {});
  const MarkPtr in = device.copy_async(Direction::in, {copy_of(target, second)}, {});
  const MarkPtr out = device.copy_async(Direction::out, {copy_of(back, target)}, {in});
  device.wait(out);
  CHECK(device.reached(in) && device.reached(out) && device.reached(nullptr));
  CHECK(back == second);
}

void a_copy_waits_for_the_other_direction() {
  QueueDevice device;
  const Bytes old_block(4096, std::byte{1}), new_block(4096, std::byte{2});
  Bytes slot = old_block, saved(4096);
  const MarkPtr saves = device.copy_async(Direction::out, {copy_of(saved, slot)}, {});
  const MarkPtr loads = device.copy_async(Direction::in, {copy_of(slot, new_block)}, {saves});
  std::atomic<bool> taken{false};
  std::thread in([&] {
    serve_once(device, Direction::in);
    taken = true;
  });
  CHECK(!taken && !device.reached(loads));
  CHECK(serve_once(device, Direction::out) == 1);
  in.join();
  device.wait(loads);
  CHECK(saved == old_block && slot == new_block);
}

void points_travel_with_the_copy_that_waits_for_them() {
  QueueDevice device;
  const Bytes source(16);
  Bytes target(16);
  MarkPtr point = device.mark_compute(7);
  device.copy_async(Direction::in, {copy_of(target, source)}, {point, nullptr});
  point.reset();
  CHECK(device.take_forgotten().empty());  // the command needs it
  auto commands = device.take(Direction::in);
  CHECK(commands.size() == 1 && commands[0].points == std::vector<Compute>{7});
  CHECK(device.take_forgotten().empty());
  device.complete(commands[0].id);
  CHECK(device.take_forgotten() == std::vector<Compute>{7});
}

void a_point_is_asked_for_once() {
  QueueDevice device;
  const MarkPtr point = device.mark_compute(9);
  CHECK(!device.reached(point) && !device.reached(point));
  const auto commands = device.take(Direction::out);
  CHECK(commands.size() == 1 && commands[0].copies.empty());
  CHECK(commands[0].points == std::vector<Compute>{9});
  device.complete(commands[0].id);
  CHECK(device.reached(point));
  device.wait(point);
}

void failures_reach_whoever_comes_after() {
  QueueDevice device;
  const Bytes source(16);
  Bytes target(16), back(16);
  const MarkPtr in = device.copy_async(Direction::in, {copy_of(target, source)}, {});
  const MarkPtr out = device.copy_async(Direction::out, {copy_of(back, target)}, {in});
  const MarkPtr other = device.copy_async(Direction::out, {copy_of(back, target)}, {});
  device.fail(device.take(Direction::in)[0].id, "the device is on fire");
  CHECK(throws<TransferError>([&] { device.reached(in); }));
  const auto commands = device.take(Direction::out);  // `out` itself is never made
  CHECK(commands.size() == 1);
  CHECK(throws<TransferError>([&] { device.wait(out); }));
  device.complete(commands[0].id);
  CHECK(device.reached(other));
}

void closing_fails_what_is_under_way() {
  auto device = std::make_unique<QueueDevice>();
  const Bytes source(16);
  Bytes target(16);
  const MarkPtr mark = device->copy_async(Direction::in, {copy_of(target, source)}, {});
  std::thread waits([&] { CHECK(throws<TransferError>([&] { device->wait(mark); })); });
  std::thread takes([&] { CHECK(device->take(Direction::out).empty()); });
  device->close("closed");
  waits.join();
  takes.join();
  CHECK(device->take(Direction::in).empty());
  CHECK(throws<TransferError>([&] { device->copy_async(Direction::in, {}, {}); }));
  const MarkPtr late = device->mark_compute(1);
  CHECK(throws<TransferError>([&] { device->wait(late); }));
  device.reset();  // marks outlive it
}

void staging_comes_from_pinned_memory_while_it_lasts() {
  QueueDevice device;
  Bytes plain(64);
  CHECK(device.reaches(plain.data(), plain.size()));
  auto block = std::make_shared<Bytes>(4 * 4096 + 4095);
  std::byte* const pinned = block->data();
  device.add_pinned(pinned, block->size(), block);
  CHECK(!device.reaches(plain.data(), plain.size()));
  CHECK(throws<ConfigError>([&] { device.add_pinned(pinned, block->size(), block); }));
  const auto inside = [&](const std::shared_ptr<Memory>& memory) {
    CHECK(reinterpret_cast<std::uintptr_t>(memory->data()) % 4096 == 0);
    return device.reaches(memory->data(), memory->nbytes());
  };
  auto first = device.allocate_staging(4096);
  const auto second = device.allocate_staging(5000);
  CHECK(inside(first) && inside(second) && first->data() != second->data());
  CHECK(!inside(device.allocate_staging(8192)));  // more than is left
  first.reset();
  CHECK(inside(device.allocate_staging(4000)));
  CHECK(throws<DeviceError>([&] { device.allocate(4096); }));
  CHECK(throws<DeviceError>([&] { device.pin(plain.data(), 64); }));
}

// Threads that swap blocks in and out of slots, as I/O threads do.
void stress() {
  constexpr std::size_t kNumSlots = 8, kNbytes = 2048, kNumThreads = 3, kRounds = 400;
  QueueDevice device;
  const Servants servants(device);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kNumThreads; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      std::vector<Bytes> slots(kNumSlots, Bytes(kNbytes)), hosts = slots, saved = slots;
      std::vector<MarkPtr> last(kNumSlots);
      for (std::size_t i = 0; i < kRounds; ++i) {
        const std::size_t at = random() % kNumSlots;
        device.wait(last[at]);
        CHECK(saved[at] == hosts[at]);
        hosts[at].assign(kNbytes, static_cast<std::byte>(random()));
        const MarkPtr in = device.copy_async(Direction::in, {copy_of(slots[at], hosts[at])},
                                             {device.mark_compute(i)});
        last[at] = device.copy_async(Direction::out, {copy_of(saved[at], slots[at])}, {in});
      }
      for (const MarkPtr& mark : last) device.wait(mark);
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(device.take_forgotten().size() == kNumThreads * kRounds);
}

}  // namespace

int main() {
  copies_arrive_in_order();
  a_copy_waits_for_the_other_direction();
  points_travel_with_the_copy_that_waits_for_them();
  a_point_is_asked_for_once();
  failures_reach_whoever_comes_after();
  closing_fails_what_is_under_way();
  staging_comes_from_pinned_memory_while_it_lasts();
  stress();
  std::puts("ok");
}
