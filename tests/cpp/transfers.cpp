// The order of transfers, by a device whose every chunk waits to be let through. No clocks.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "transfer.h"

using namespace tiered_mem;

namespace {

#define CHECK(condition)                                                 \
  do {                                                                   \
    if (condition) break;                                                \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::abort();                                                        \
  } while (false)

using Log = std::vector<std::string>;

// Copies a chunk when it is let through, and logs the block's name (its first byte) and chunk.
class GatedDevice final : public Device {
 public:
  std::shared_ptr<Memory> allocate(std::uint64_t) override { return nullptr; }
  std::shared_ptr<Memory> allocate_staging(std::uint64_t) override { return nullptr; }
  bool host_accessible() const override { return true; }
  MarkPtr copy_async(Direction, const std::vector<Copy>& copies,
                     const std::vector<MarkPtr>&) override {
    const auto [target, source, nbytes] = copies.at(0);
    std::unique_lock lock(mutex_);
    const std::string label{static_cast<char>(source[0]), static_cast<char>(source[1])};
    log_.push_back(label);
    waiting_.insert(label);
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_ || allowed_.erase(label) > 0; });
    waiting_.erase(label);
    changed_.notify_all();
    if (failing_.count(label)) throw std::runtime_error("chunk " + label + " fails");
    std::memcpy(target, source, nbytes);
    return nullptr;
  }
  bool reached(const MarkPtr&) override { return true; }
  void wait(const MarkPtr&) override {}

  // Waits until a chunk is under way.
  void await(const std::string& label) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_.count(label) > 0; });
  }
  // Waits until a chunk is under way, and lets it through.
  void let(const std::string& label) {
    await(label);
    std::unique_lock lock(mutex_);
    allowed_.insert(label);
    changed_.notify_all();
    changed_.wait(lock, [&] { return waiting_.count(label) == 0; });
  }
  void let_all() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void fail(const std::string& label) {
    std::lock_guard lock(mutex_);
    failing_.insert(label);
  }
  Log log() {
    std::lock_guard lock(mutex_);
    return log_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::multiset<std::string> waiting_;
  std::set<std::string> allowed_, failing_;
  bool open_ = false;
  Log log_;
};

struct Block {
  std::shared_ptr<std::vector<std::byte>> source, target;
  std::shared_ptr<Transfer> transfer = std::make_shared<Transfer>();
  struct Ends {  // outlives the block while a thread still says that its transfer ended
    int num = 0;
    std::mutex mutex;
    std::condition_variable changed;
  };
  std::shared_ptr<Ends> ends = std::make_shared<Ends>();

  Block(char name, std::size_t num_chunks, std::uint64_t due = 0, double probability = 0,
        Link link = Link::dram_to_hbm) {
    source = std::make_shared<std::vector<std::byte>>(num_chunks * kChunk, std::byte(name));
    target = std::make_shared<std::vector<std::byte>>(num_chunks * kChunk);
    for (std::size_t i = 0; i < num_chunks; ++i)
      (*source)[i * kChunk + 1] = static_cast<std::byte>('0' + i);
    transfer->link = link;
    transfer->nbytes = num_chunks * kChunk;
    transfer->source = source->data();
    transfer->target = target->data();
    transfer->due = due;
    transfer->probability = probability;
    transfer->keep_alive = {source, target};
    transfer->on_end = [ends = ends](Transfer&) {
      std::lock_guard lock(ends->mutex);
      ++ends->num;
      ends->changed.notify_all();
    };
  }
  Transfer::Status wait() {
    std::unique_lock lock(ends->mutex);
    ends->changed.wait(lock, [&] { return ends->num > 0; });
    return transfer->status();
  }
  bool arrived() const { return *source == *target; }
};

using Status = Transfer::Status;

// Whole chunks, one at a time: the order is easy to follow.
constexpr PrefetchPace kWholeChunks{kChunk, 1};

void demand_overtakes_prefetch_at_the_next_chunk() {
  GatedDevice device;
  TransferEngine engine(1, device, kWholeChunks);
  Block guess('g', 3), demand('d', 2);
  CHECK(engine.submit(guess.transfer, Priority::prefetch));
  device.await("g0");
  CHECK(engine.submit(demand.transfer, Priority::demand));
  for (const char* label : {"g0", "d0", "d1", "g1", "g2"}) device.let(label);
  CHECK(demand.wait() == Status::done && guess.wait() == Status::done);
  CHECK((device.log() == Log{"g0", "d0", "d1", "g1", "g2"}));
  CHECK(demand.arrived() && guess.arrived());
  CHECK(engine.nbytes_moved(Link::dram_to_hbm) == 5 * kChunk);
}

void prefetches_go_by_due_time_and_probability_one_chunk_at_a_time() {
  GatedDevice device;
  TransferEngine engine(3, device, kWholeChunks);
  Block first('f', 1), late('l', 1, 2, 1.0), unlikely('u', 1, 1, 0.1), likely('k', 2, 1, 0.9);
  engine.submit(first.transfer, Priority::prefetch);
  device.await("f0");
  for (Block* block : {&late, &unlikely, &likely})
    engine.submit(block->transfer, Priority::prefetch);
  // Three threads, but a prefetch starts on an idle link alone: the next only after this one.
  for (const char* label : {"f0", "k0", "k1", "u0", "l0"}) {
    device.await(label);
    CHECK(device.log().back() == label);
    device.let(label);
  }
  CHECK(late.wait() == Status::done);
}

void a_prefetch_does_not_start_beside_a_demand_on_its_link() {
  GatedDevice device;
  TransferEngine engine(2, device, kWholeChunks);
  Block demand('d', 1), guess('g', 1), other('o', 1, 0, 0, Link::hbm_to_dram);
  engine.submit(demand.transfer, Priority::demand);
  device.await("d0");
  engine.submit(guess.transfer, Priority::prefetch);
  engine.submit(other.transfer, Priority::prefetch);
  device.await("o0");  // the other link is idle
  CHECK((device.log() == Log{"d0", "o0"}));
  for (const char* label : {"o0", "d0", "g0"}) device.let(label);
  CHECK(guess.wait() == Status::done);
}

void a_raised_prefetch_is_a_demand() {
  GatedDevice device;
  TransferEngine engine(1, device, kWholeChunks);
  Block first('f', 1), second('s', 1), third('t', 1);
  engine.submit(first.transfer, Priority::prefetch);
  device.await("f0");
  engine.submit(second.transfer, Priority::prefetch);
  engine.submit(third.transfer, Priority::prefetch);
  CHECK(engine.raise(third.transfer));
  for (const char* label : {"f0", "t0", "s0"}) device.let(label);
  CHECK(second.wait() == Status::done);
  CHECK((device.log() == Log{"f0", "t0", "s0"}));
  CHECK(!engine.raise(third.transfer));  // has ended
}

void a_cancelled_transfer_moves_nothing_more() {
  GatedDevice device;
  TransferEngine engine(1, device, kWholeChunks);
  Block started('s', 3), queued('q', 1);
  engine.submit(started.transfer, Priority::prefetch);
  device.await("s0");
  engine.submit(queued.transfer, Priority::prefetch);
  std::weak_ptr<void> buffer = queued.target;
  queued.target.reset();
  CHECK(!buffer.expired());               // the ticket keeps it alive
  CHECK(engine.cancel(queued.transfer));  // ended by it, so nobody is called
  CHECK(buffer.expired());
  CHECK(queued.transfer->status() == Status::cancelled && queued.ends->num == 0);
  CHECK(!engine.cancel(started.transfer));  // its chunk is under way
  CHECK(!started.transfer->ended());
  device.let("s0");
  CHECK(started.wait() == Status::cancelled);
  CHECK(started.transfer->nbytes_moved() == kChunk);
  CHECK((device.log() == Log{"s0"}));
}

void a_cancelled_transfer_can_be_raised_while_its_chunk_is_under_way() {
  GatedDevice device;
  TransferEngine engine(1, device, kWholeChunks);
  Block block('b', 3);
  engine.submit(block.transfer, Priority::prefetch);
  device.await("b0");
  CHECK(!engine.cancel(block.transfer));
  CHECK(engine.raise(block.transfer));
  device.let_all();
  CHECK(block.wait() == Status::done && block.arrived());
}

void a_failed_chunk_is_not_forgotten_by_cancel_and_raise() {
  GatedDevice device;
  TransferEngine engine(2, device, kWholeChunks);
  Block block('b', 3);
  engine.submit(block.transfer, Priority::demand);
  device.await("b0");
  device.await("b1");
  CHECK(!engine.cancel(block.transfer));
  device.fail("b0");
  Block probe('p', 1);  // claimed by the thread of b0 once the failure is in the accounts
  engine.submit(probe.transfer, Priority::demand);
  device.let("b0");
  device.await("p0");
  CHECK(!engine.raise(block.transfer));
  device.let_all();
  CHECK(block.wait() == Status::failed);
  CHECK(block.transfer->error() != nullptr && block.ends->num == 1);
}

void a_transfer_waits_for_those_before_it() {
  GatedDevice device;
  TransferEngine engine(2, device, kWholeChunks);
  Block reader('r', 1, 0, 0, Link::hbm_to_dram), writer('w', 1), free('f', 1);
  writer.transfer->after = {reader.transfer};
  engine.submit(reader.transfer, Priority::demand);
  device.await("r0");
  engine.submit(writer.transfer, Priority::demand);
  engine.submit(free.transfer, Priority::demand);
  device.let("f0");  // it may pass; the writer may not
  CHECK(free.wait() == Status::done);
  CHECK((device.log() == Log{"r0", "f0"}));
  device.let("r0");
  device.let("w0");
  CHECK(writer.wait() == Status::done);
}

void a_copy_of_what_never_arrived_fails() {
  GatedDevice device;
  TransferEngine engine(2, device, kWholeChunks);
  Block feed('f', 1, 0, 0, Link::hbm_to_dram), copy('c', 1);
  copy.transfer->fed_by = feed.transfer;
  device.fail("f0");
  engine.submit(feed.transfer, Priority::demand);
  engine.submit(copy.transfer, Priority::demand);
  device.let("f0");
  CHECK(feed.wait() == Status::failed);
  CHECK(copy.wait() == Status::failed);
  CHECK((device.log() == Log{"f0"}));
}

void what_a_demand_waits_for_is_a_demand() {
  GatedDevice device;
  TransferEngine engine(1, device, kWholeChunks);
  Block busy('b', 1), other('o', 1, 0, 0, Link::hbm_to_dram);
  Block leaving('l', 1, 0, 0, Link::hbm_to_dram), load('d', 1);
  load.transfer->after = {leaving.transfer};
  engine.submit(busy.transfer, Priority::demand);
  device.await("b0");
  engine.submit(other.transfer, Priority::prefetch);
  engine.submit(leaving.transfer, Priority::prefetch);
  engine.submit(load.transfer, Priority::demand);
  device.let_all();
  CHECK(other.wait() == Status::done);
  CHECK((device.log() == Log{"b0", "l0", "d0", "o0"}));
}

void stop_ends_everything_once() {
  GatedDevice device;
  TransferEngine engine(1, device, kWholeChunks);
  Block started('s', 2), queued('q', 1), guess('g', 1), late('l', 1);
  engine.submit(started.transfer, Priority::demand);
  device.await("s0");
  engine.submit(queued.transfer, Priority::demand);
  engine.submit(guess.transfer, Priority::prefetch);
  std::thread stopper([&] { engine.stop(); });
  CHECK(queued.wait() == Status::cancelled && guess.wait() == Status::cancelled);
  CHECK(!started.transfer->ended());  // its chunk still reads and writes the buffers
  device.let_all();
  stopper.join();
  CHECK(started.transfer->status() == Status::cancelled);
  CHECK(started.ends->num == 1 && queued.ends->num == 1 && guess.ends->num == 1);
  CHECK(!engine.submit(late.transfer, Priority::demand));
  CHECK(late.transfer->status() == Status::cancelled && late.ends->num == 0);
  CHECK(!engine.raise(late.transfer) && !engine.cancel(late.transfer));
}

}  // namespace

void prefetch_moves_in_pieces_and_what_was_raised_goes_on_at_once() {
  GatedDevice device;
  TransferEngine engine(1, device, {kChunk / 4, 1});
  Block guess('g', 1), demand('d', 1);
  for (int i = 1; i < 4; ++i) (*guess.source)[i * kChunk / 4 + 1] = static_cast<std::byte>('a' + i);
  engine.submit(guess.transfer, Priority::prefetch);
  device.await("g0");
  engine.submit(demand.transfer, Priority::demand);
  for (const char* label : {"g0", "d0"}) device.let(label);
  device.await("gb");
  CHECK(engine.raise(guess.transfer));
  for (const char* label : {"gb", "gc"}) device.let(label);
  CHECK(guess.wait() == Status::done);
  CHECK((device.log() == Log{"g0", "d0", "gb", "gc"}));  // the last two quarters came together
  CHECK(guess.arrived() && engine.nbytes_moved(Link::dram_to_hbm) == 2 * kChunk);
}

void pieces_of_a_prefetch_leave_a_thread_to_demand() {
  GatedDevice device;
  TransferEngine engine(3, device, {kChunk / 4, 8});
  Block guess('g', 1), demand('d', 1);
  for (int i = 1; i < 4; ++i) (*guess.source)[i * kChunk / 4 + 1] = static_cast<std::byte>('a' + i);
  engine.submit(guess.transfer, Priority::prefetch);
  device.await("g0");
  device.await("gb");
  CHECK(device.log().size() == 2);
  engine.submit(demand.transfer, Priority::demand);
  for (const char* label : {"d0", "gb", "g0", "gc", "gd"}) device.let(label);
  CHECK(guess.wait() == Status::done && demand.wait() == Status::done);
}

int main() {
  demand_overtakes_prefetch_at_the_next_chunk();
  prefetches_go_by_due_time_and_probability_one_chunk_at_a_time();
  a_prefetch_does_not_start_beside_a_demand_on_its_link();
  a_raised_prefetch_is_a_demand();
  a_cancelled_transfer_moves_nothing_more();
  a_cancelled_transfer_can_be_raised_while_its_chunk_is_under_way();
  a_failed_chunk_is_not_forgotten_by_cancel_and_raise();
  a_transfer_waits_for_those_before_it();
  a_copy_of_what_never_arrived_fails();
  what_a_demand_waits_for_is_a_demand();
  prefetch_moves_in_pieces_and_what_was_raised_goes_on_at_once();
  pieces_of_a_prefetch_leave_a_thread_to_demand();
  stop_ends_everything_once();
  std::puts("ok");
  return 0;
}
