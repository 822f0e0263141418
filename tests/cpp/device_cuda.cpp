// CudaDevice on the double of the driver, to be built with -fsanitize=thread or address,undefined.
//
//   device_cuda METHOD SECONDS   random batches in both directions from several threads, byte by
//                                byte, by one copy method
//   device_cuda failures 0       copies that fail when they are told, then the device
#include "device_cuda.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <random>
#include <thread>

#include "cuda_double.h"
#include "error.h"

using namespace tiered_mem;

namespace {

constexpr int kNumThreads = 3, kNumSlots = 6, kNumBuffers = 12;
constexpr std::uint64_t kSlot = 40000;

struct Slot {
  std::uint64_t address;
  std::vector<std::byte> bytes;  // what it holds when all that was told is done
  MarkPtr written;
  std::vector<MarkPtr> read;
};

// Host memory that a batch may be using.
struct Buffer {
  std::byte* data;
  MarkPtr mark;
  std::vector<std::byte> expected;  // if it is a target
};

class Worker {
 public:
  Worker(Double& driver, CudaDevice& device, std::shared_ptr<const cuda::Context> context,
         unsigned seed)
      : device_(device),
        rng_(seed),
        compute_(context),
        memory_(driver, context, kNumSlots * kSlot),
        staging_(device.allocate_staging(kNumBuffers / 3 * kSlot)),
        registered_(make_host_device()->allocate(kNumBuffers / 3 * kSlot)),
        // Two registrations: a block may lie across both.
        pins_{
            device.pin(registered_->data(), 2 * 4096),
            device.pin(registered_->data() + 2 * 4096, round_up(registered_->nbytes()) - 2 * 4096)},
        pageable_(kNumBuffers / 3 * kSlot) {
    for (int i = 0; i < kNumSlots; ++i)
      slots_.push_back({reinterpret_cast<std::uint64_t>(memory_.data()) + kSlot * i,
                        std::vector<std::byte>(kSlot, std::byte{0xCD}),
                        nullptr,
                        {}});
    for (std::byte* base : {staging_->data(), registered_->data(), pageable_.data()})
      for (int i = 0; i < kNumBuffers / 3; ++i) buffers_.push_back({base + kSlot * i, nullptr, {}});
    check(device.reaches(staging_->data(), kSlot) && device.reaches(registered_->data(), kSlot) &&
              !device.reaches(pageable_.data(), 1),
          "what the device reaches");
  }

  void step() {
    const unsigned what = rng_() % 8;
    if (what < 3)
      write();
    else if (what < 6)
      read();
    else
      compute();
    // Marks go in any order, and some stay.
    if (rng_() % 4 == 0 && !old_.empty()) old_.erase(old_.begin() + rng_() % old_.size());
  }

  void finish() {
    for (Buffer& buffer : buffers_) settle(buffer);
    for (Slot& slot : slots_) {
      device_.wait(slot.written);
      for (const MarkPtr& mark : slot.read) device_.wait(mark);
    }
    check(compute_.synchronize() == 0, "computing");
  }

 private:
  static std::uint64_t round_up(std::uint64_t nbytes) { return (nbytes + 4095) / 4096 * 4096; }

  void settle(Buffer& buffer) {
    if (rng_() % 2)
      while (!device_.reached(buffer.mark)) std::this_thread::yield();
    device_.wait(buffer.mark);
    check(buffer.expected.empty() ||
              std::memcmp(buffer.data, buffer.expected.data(), buffer.expected.size()) == 0,
          "the bytes of a copy");
    buffer.expected.clear();
  }

  std::vector<int> sample(int count) {
    std::vector<int> all;
    for (int i = 0; i < kNumSlots; ++i) all.push_back(i);
    std::shuffle(all.begin(), all.end(), rng_);
    all.resize(static_cast<std::size_t>(count));
    return all;
  }

  Buffer& take(std::vector<Buffer*>& used) {
    Buffer* buffer = &buffers_[rng_() % kNumBuffers];
    while (std::find(used.begin(), used.end(), buffer) != used.end())
      buffer = &buffers_[rng_() % kNumBuffers];
    settle(*buffer);
    used.push_back(buffer);
    return *buffer;
  }

  void keep(const MarkPtr& mark) {
    old_.push_back(mark);
    if (old_.size() > 50) old_.pop_front();
  }

  void write() {
    std::vector<Copy> copies;
    std::vector<MarkPtr> after;
    std::vector<Buffer*> used;
    std::vector<Slot*> targets;
    for (int i : sample(1 + static_cast<int>(rng_() % 3))) {
      Buffer& buffer = take(used);
      Slot& slot = slots_[static_cast<std::size_t>(i)];
      const std::uint64_t nbytes = 1 + rng_() % kSlot, from = rng_() % (kSlot - nbytes + 1);
      const auto seed = static_cast<unsigned>(rng_());
      for (std::uint64_t at = 0; at < nbytes; ++at)
        buffer.data[at] = static_cast<std::byte>(seed + at * 13 + at / 256);
      std::memcpy(slot.bytes.data() + from, buffer.data, nbytes);
      copies.push_back({reinterpret_cast<std::byte*>(slot.address + from), buffer.data, nbytes});
      after.push_back(slot.written);
      after.insert(after.end(), slot.read.begin(), slot.read.end());
      slot.read.clear();
      targets.push_back(&slot);
    }
    const MarkPtr mark = device_.copy_async(Direction::in, copies, after);
    for (Buffer* buffer : used) buffer->mark = mark;
    for (Slot* slot : targets) slot->written = mark;
    keep(mark);
  }

  void read() {
    std::vector<Copy> copies;
    std::vector<MarkPtr> after;
    std::vector<Buffer*> used;
    std::vector<Slot*> sources;
    for (int i : sample(1 + static_cast<int>(rng_() % 3))) {
      Buffer& buffer = take(used);
      Slot& slot = slots_[static_cast<std::size_t>(i)];
      buffer.expected = slot.bytes;
      copies.push_back({buffer.data, reinterpret_cast<std::byte*>(slot.address), kSlot});
      after.push_back(slot.written);
      sources.push_back(&slot);
    }
    const MarkPtr mark = device_.copy_async(Direction::out, copies, after);
    for (Buffer* buffer : used) buffer->mark = mark;
    for (Slot* slot : sources) slot->read.push_back(mark);
    keep(mark);
  }

  void compute() {
    Slot& slot = slots_[rng_() % kNumSlots];
    std::vector<Buffer*> used;
    Buffer& buffer = take(used);
    if (buffer.data < staging_->data() || buffer.data >= staging_->data() + staging_->nbytes())
      return;  // a whole slot of memory that isn't one range of the driver's
    device_.hold_compute(compute_.number(), slot.written);
    buffer.expected = slot.bytes;
    check(compute_.read(buffer.data, slot.address, kSlot) == 0, "computing");
    buffer.mark = device_.mark_compute(compute_.number());
    slot.read.push_back(buffer.mark);
  }

  CudaDevice& device_;
  std::mt19937 rng_;
  ComputeStream compute_;
  DeviceMemory memory_;
  std::shared_ptr<Memory> staging_, registered_;
  std::vector<std::shared_ptr<void>> pins_;
  std::vector<std::byte> pageable_;
  std::vector<Slot> slots_;
  std::vector<Buffer> buffers_;
  std::deque<MarkPtr> old_;
};

void stress(Double& driver, const std::string& method, double seconds) {
  {
    auto context = std::make_shared<const cuda::Context>(0);
    CudaDevice device(CudaConfig{0, method});
    // How a fatbin begins: the double has the kernels itself.
    if (method == "kernel")
      device.load_kernels(std::string("\x50\xed\x55\xba", 4) + std::string(60, 0));
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < kNumThreads; ++i)
      threads.emplace_back([&, i] {
        Worker worker(driver, device, context, i);
        while (!stop) worker.step();
        worker.finish();
      });
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    stop = true;
    for (std::thread& thread : threads) thread.join();
  }
  std::printf("%lld copies, %lld batches, %lld launches\n", driver.count("copies"),
              driver.count("batches"), driver.count("launches"));
  check(driver.count("copies") + driver.count("launches") > 0, "nothing was copied");
  check((driver.count("batches") > 0) == (method == "batch"), "batches");
  check((driver.count("launches") > 0) == (method == "kernel"), "launches");
  driver.check_order();
  driver.check_nothing_lives();
}

template <typename Error>
bool throws(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void failures(Double& driver) {
  {
    auto context = std::make_shared<const cuda::Context>(0);
    CudaDevice device(CudaConfig{0, "engine"});
    const DeviceMemory memory(driver, context, kSlot);
    const auto staging = device.allocate_staging(kSlot);
    const auto copy = [&](Direction direction, std::vector<MarkPtr> after = {}) {
      const bool in = direction == Direction::in;
      return device.copy_async(
          direction,
          {{in ? memory.data() : staging->data(), in ? staging->data() : memory.data(), kSlot}},
          after);
    };
    // What fails when it is told fails alone.
    for (const char* function : {"cuMemcpyHtoDAsync", "cuEventRecord"}) {
      driver.fail(function, 1, 2);
      check(throws<TransferError>([&] { copy(Direction::in); }), "a copy that can't be told");
    }
    driver.fail("cuMemHostAlloc", 1, 2);
    check(throws<BudgetError>([&] { device.allocate_staging(4096); }), "staging");
    driver.fail("cuMemHostRegister", 1, 2);
    std::vector<std::byte> host(3 * 4096);
    std::byte* page = host.data() + (4096 - reinterpret_cast<std::uintptr_t>(host.data()) % 4096);
    check(throws<DeviceError>([&] { device.pin(page, 4096); }), "pin");
    device.wait(copy(Direction::in));
    // A device that hangs reaches nothing, and says so only to who asks.
    driver.set("hang_copy", 1);
    const MarkPtr hung = copy(Direction::in);
    const MarkPtr behind = copy(Direction::out, {hung});
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    check(!device.reached(hung) && !device.reached(behind), "a copy that hangs");
    driver.release_hung();
    device.wait(behind);
    driver.check_order();
    // A device that fails says so of every mark that wasn't known to be reached.
    driver.set("fail_copy", 1);
    const MarkPtr failed = copy(Direction::in);
    check(throws<TransferError>([&] { device.wait(failed); }), "a copy that fails");
    check(throws<TransferError>([&] { device.reached(copy(Direction::in)); }), "a failed device");
    check(throws<TransferError>([&] { device.hold_compute(0, failed); }), "a failed device holds");
    check(throws<TransferError>([&] { device.mark_compute(0); }), "a failed device's mark");
    check(device.reached(behind), "what was known to be reached");
  }
  driver.check_nothing_lives();
}

// What the double is for: leaving a dependency out is found, whatever the timing.
void forget_a_dependency(Double& driver) {
  auto context = std::make_shared<const cuda::Context>(0);
  CudaDevice device(CudaConfig{0, "engine"});
  const DeviceMemory memory(driver, context, kSlot);
  const auto staging = device.allocate_staging(2 * kSlot);
  const MarkPtr in =
      device.copy_async(Direction::in, {{memory.data(), staging->data(), kSlot}}, {});
  const MarkPtr out =
      device.copy_async(Direction::out, {{staging->data() + kSlot, memory.data(), kSlot}}, {});
  device.wait(in);
  device.wait(out);
  check(driver.count("races") > 0, "a race that wasn't found");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Double driver;
  if (argv[1] == std::string("failures")) {
    failures(driver);
  } else if (argv[1] == std::string("races")) {
    forget_a_dependency(driver);
  } else {
    stress(driver, argv[1], std::atof(argv[2]));
  }
  std::printf("ok\n");
  return 0;
}
