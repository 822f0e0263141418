// Hammers the runtime over a CUDA device, played by the double of the driver; to be built with
// -fsanitize=thread or address,undefined. Exits with 0 if computing, for which the host never
// waits, read every block's bytes, all accesses were ordered and nothing was left behind.
//
//   stress_cuda FILE SECONDS METHOD
//   stress_cuda FILE 0 failure|hang   the device fails, or never ends a copy, amid everything:
//                                     not yet part of the tests, since it doesn't end
#include <atomic>
#include <chrono>
#include <deque>
#include <random>
#include <thread>

#include "blocks.h"
#include "cuda_double.h"
#include "device_cuda.h"
#include "error.h"
#include "tiers.h"

using namespace tiered_mem;
using namespace blocks;

namespace {

constexpr int kNumThreads = 3, kTopK = 3;
constexpr std::uint64_t kBlock = kChunk + 2 * kPage, kSegment = 2 * kBlock;

// Whole pages of device memory.
class Segment final : public Memory {
 public:
  Segment(Double& driver, const std::shared_ptr<const cuda::Context>& context)
      : memory_(driver, context, kSegment + kPage) {}
  std::byte* data() const override {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    return reinterpret_cast<std::byte*>((address + kPage - 1) / kPage * kPage);
  }
  std::uint64_t nbytes() const override { return kSegment; }

 private:
  DeviceMemory memory_;
};

struct Machine {
  Double& driver;
  std::shared_ptr<const cuda::Context> context;
  std::shared_ptr<CudaDevice> device;
};

// One thread's computing: reads that come when its stream gets to them.
class Worker {
 public:
  Worker(Machine& machine, Tiers& tiers, std::uint64_t stream)
      : machine_(machine),
        tiers_(tiers),
        stream_(stream),
        rng_(static_cast<unsigned>(stream)),
        compute_(machine.context),
        buffers_(machine.device->allocate_staging(kNumBuffers * kBlock)) {
    for (int i = 0; i < kNumBuffers; ++i) idle_.push_back(buffers_->data() + kBlock * i);
  }

  ~Worker() { compute_.synchronize(); }

  // Throws RuntimeClosed, or what became of the device.
  void work(const std::atomic<bool>& stop) {
    for (int step = 0; !stop; ++step) {
      const int layer = step % kNumLayers;
      const auto hinted = sample(rng_, (layer + 1) % kNumLayers, 5);
      try {
        tiers_.hint(hinted.data(), hinted.size(), stream_, rng_() % 2);
        run_event(sample(rng_, layer, kTopK));
      } catch (const EventTooLarge&) {  // between two resizes
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      while (reads_.size() > 2 * kTopK) check_read();
    }
    while (!reads_.empty()) check_read();
  }

 private:
  static constexpr int kNumBuffers = 4 * kTopK;
  struct Read {
    Key key;
    std::byte* bytes;
    MarkPtr mark;
  };

  void check_read() {
    const Read read = reads_.front();
    machine_.device->wait(read.mark);
    check_bytes(read.key, read.bytes);
    reads_.pop_front();
    idle_.push_back(read.bytes);
  }

  void run_event(const std::vector<Key>& keys) {
    const Compute compute = compute_.number();
    std::shared_ptr<Event> event;
    if (rng_() % 8 == 0) event = tiers_.acquire_resident(keys.data(), keys.size(), stream_);
    if (event)
      tiers_.note_uses(keys.data(), keys.size());
    else
      event = tiers_.acquire(keys.data(), keys.size(), stream_, rng_() % 8 != 0);
    if (!event) return;
    // What is computed ends before memory goes that was given up amid it.
    struct End {
      ComputeStream& compute;
      ~End() {
        if (std::uncaught_exceptions() > 0) compute.synchronize();
      }
    } const end{compute_};
    for (std::size_t done = 0; done < keys.size();) {
      std::vector<Event::Failure> failures;
      const auto ready = event->wait_any(failures, compute);
      for (std::uint32_t position : ready) read(keys[position], event->slots()[position]);
      done += ready.size() + failures.size();
    }
    if (rng_() % 16) event->release(compute);
  }

  void read(Key key, std::uint64_t slot) {
    while (idle_.empty()) check_read();
    std::byte* const bytes = idle_.back();
    idle_.pop_back();
    const std::uint64_t nbytes = nbytes_of(static_cast<int>(key >> 32 & 0xFFFF));
    if (compute_.read(bytes, slot, nbytes) != 0) throw TransferError("computing failed");
    reads_.push_back({key, bytes, machine_.device->mark_compute(compute_.number())});
  }

  Machine& machine_;
  Tiers& tiers_;
  const std::uint64_t stream_;
  std::mt19937 rng_;
  ComputeStream compute_;
  std::shared_ptr<Memory> buffers_;
  std::vector<std::byte*> idle_;
  std::deque<Read> reads_;
};

void shake(Machine& machine, Tiers& tiers, std::uint64_t hbm, std::uint64_t dram,
           const std::atomic<bool>& stop) {
  std::mt19937 rng(99);
  while (!stop) {
    const std::uint64_t wanted = rng() % 2 ? hbm : hbm / 2 + rng() % (hbm / 2);
    for (bool fits = false; !fits;) try {
        tiers.resize_hbm(wanted);
        fits = true;
      } catch (const BudgetError&) {  // a shrink gave segments back
        tiers.add_segment(std::make_shared<Segment>(machine.driver, machine.context));
      }
    if (rng() % 4 == 0) tiers.resize_dram(rng() % 4 ? dram / 2 + rng() % (dram / 2) : 0);
    while (tiers.pin_dram(3 * kPage + rng() % kBlock) != 0 && rng() % 4) {
    }
    tiers.throttle(static_cast<Link>(rng() % 3), rng() % 2 ? 0 : 2e9);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

TiersConfig config_of(const char* eviction) {
  TiersConfig config;
  config.hbm_nbytes = 3 * kSegment;
  config.dram_nbytes = 4 * kBlock;
  config.eviction = eviction;
  config.num_io_threads = 3;
  return config;
}

std::shared_ptr<Tiers> make_tiers(Machine& machine, const Blocks& blocks,
                                  const TiersConfig& config) {
  auto tiers = std::make_shared<Tiers>(config, machine.device, [] {});
  tiers->add_blocks(blocks.keys, blocks.extents);
  for (int i = 0; i < 3; ++i)
    tiers->add_segment(std::make_shared<Segment>(machine.driver, machine.context));
  return tiers;
}

// Whatever ends the threads, they end. `amid` runs while they are at it.
void run(Machine& machine, const Blocks& blocks, const TiersConfig& config, double seconds,
         const std::function<void(Tiers&)>& amid, std::atomic<int>& num_failed) {
  const auto tiers = make_tiers(machine, blocks, config);
  std::atomic<bool> stop{false};
  const auto guarded = [&](const std::function<void()>& body) {
    try {
      body();
    } catch (const RuntimeClosed&) {
    } catch (const TransferError& error) {
      if (num_failed++ == 0) std::printf("%s\n", error.what());
    } catch (const DeviceError&) {
      ++num_failed;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kNumThreads; ++i)
    threads.emplace_back([&, i] {
      guarded([&] { Worker(machine, *tiers, static_cast<std::uint64_t>(i)).work(stop); });
    });
  threads.emplace_back([&] {
    guarded([&] { shake(machine, *tiers, config.hbm_nbytes, config.dram_nbytes, stop); });
  });
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  amid(*tiers);
  stop = true;
  for (std::thread& thread : threads) thread.join();
  const TiersStats stats = tiers->stats();
  std::printf("%s: %lu events, %lu hits, %lu in flight, %lu from DRAM, %lu from NVMe, %lu failed\n",
              config.eviction.c_str(), stats.num_events, stats.num_hbm_hits, stats.num_in_flight,
              stats.num_dram_hits, stats.num_nvme_reads, stats.num_failed);
  tiers->close();
}

void stress(Double& driver, const Blocks& blocks, double seconds, const std::string& method) {
  {
    Machine machine{driver, std::make_shared<const cuda::Context>(0),
                    std::make_shared<CudaDevice>(CudaConfig{0, method})};
    if (method == "kernel")
      machine.device->load_kernels(std::string("\x50\xed\x55\xba", 4) + std::string(60, 0));
    std::atomic<int> num_failed{0};
    run(machine, blocks, config_of("lru"), seconds / 2, [](Tiers&) {}, num_failed);
    run(
        machine, blocks, config_of("per-layer(lru)"), seconds / 2,
        [](Tiers& tiers) { tiers.close(); }, num_failed);
    check(num_failed == 0, "an error that nobody asked for");
  }
  check(driver.count("pageable_copies") == 0, "a copy went past the staging memory");
  driver.check_order();
  driver.check_nothing_lives();
}

void break_device(Double& driver, const Blocks& blocks, const char* how) {
  {
    Machine machine{driver, std::make_shared<const cuda::Context>(0),
                    std::make_shared<CudaDevice>(CudaConfig{0, "engine"})};
    TiersConfig config = config_of("lru");
    config.watchdog_seconds = 0.5;
    std::atomic<int> num_failed{0};
    const auto amid = [&](Tiers& tiers) {
      driver.set(how, 5);
      const auto ask = [&] {  // false when the runtime says what happened
        try {
          tiers.acquire(&blocks.keys[0], 1, 99, false);
          return true;
        } catch (const Error& error) {
          std::printf("%s\n", error.what());
          return false;
        }
      };
      bool open = true;
      for (int i = 0; i < 2000 && (open = ask()); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      check(!open, "nobody heard of it");
      driver.release_hung();  // so that the threads that wait for their computing end
    };
    run(machine, blocks, config, 0.3, amid, num_failed);
  }
  driver.check_nothing_lives(true);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  Double driver;
  const Blocks blocks = write_blocks(argv[1]);
  const std::string what = argv[3];
  if (what == "failure" || what == "hang")
    break_device(driver, blocks, what == "hang" ? "hang_copy" : "fail_copy");
  else
    stress(driver, blocks, std::atof(argv[2]), what);
  std::printf("ok\n");
  return 0;
}
