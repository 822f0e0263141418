// Hammers the runtime from several threads, to be built with -fsanitize=thread or
// address,undefined. Exits with 0 if every slot held its block's bytes.
//
//   stress FILE SECONDS
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "blocks.h"
#include "error.h"
#include "tiers.h"

using namespace tiered_mem;
using namespace blocks;

namespace {

constexpr int kNumThreads = 4, kTopK = 3;

// One event: wait for all of its blocks, repair some of the damaged ones, look at the bytes.
void run_event(Tiers& tiers, const std::byte* memory, const std::vector<Key>& keys,
               std::uint64_t stream, std::mt19937& rng) {
  const auto event = tiers.acquire(keys.data(), keys.size(), stream, rng() % 8 != 0);
  if (!event || rng() % 16 == 0) return;
  for (std::size_t done = 0; done < keys.size();) {
    std::vector<Event::Failure> failures;
    const auto ready = event->wait_any(failures);
    for (std::uint32_t position : ready)
      check_bytes(keys[position], memory + event->slots()[position]);
    for (const Event::Failure& failure : failures) {
      check(failure.error != nullptr, "an error without a reason");
      if (rng() % 2) continue;
      fill(keys[failure.position],
           const_cast<std::byte*>(memory) + event->slots()[failure.position]);
      event->repaired(failure.position);
    }
    done += ready.size() + failures.size();
  }
  event->release();
}

void work(Tiers& tiers, const std::byte* memory, std::uint64_t stream,
          const std::atomic<bool>& stop) {
  std::mt19937 rng(static_cast<unsigned>(stream));
  for (int step = 0; !stop; ++step) {
    const int layer = step % kNumLayers;
    const auto hinted = sample(rng, (layer + 1) % kNumLayers, 5);
    try {
      tiers.hint(hinted.data(), hinted.size(), stream, rng() % 2);
      run_event(tiers, memory, sample(rng, layer, kTopK), stream, rng);
    } catch (const RuntimeClosed&) {
      return;
    } catch (const EventTooLarge&) {  // between two resizes
    }
  }
}

// Blocks that come from the caller, sometimes without their bytes: read back from whichever tier
// they are in, then forgotten.
void make_and_forget(Tiers& tiers, const Blocks& blocks, std::byte* memory,
                     const std::atomic<bool>& stop) {
  constexpr std::uint64_t kStream = kNumThreads;
  std::mt19937 rng(7);
  while (!stop) {
    const int layer = static_cast<int>(rng() % kNumLayers);
    const int index = static_cast<int>(rng() % kNumExperts);
    if (damaged(layer, index)) continue;
    const Key known = key_of(0, layer, index), made = key_of(1, layer, index);
    const auto place = std::find(blocks.keys.begin(), blocks.keys.end(), known);
    tiers.add_blocks({made},
                     {blocks.extents[static_cast<std::size_t>(place - blocks.keys.begin())]});
    try {
      const auto created = tiers.create(&made, 1, kStream, 0);
      if (rng() % 8 != 0) {
        fill(known, memory + created->slots()[0]);
        created->repaired(0);
      }
      created->release();
      for (int i = 0; i < 2; ++i) {
        const auto event = tiers.acquire(&made, 1, kStream, true);
        std::vector<Event::Failure> failures;
        event->wait_any(failures);
        check(failures.empty(), "a block that was made");
        check_bytes(known, memory + event->slots()[0]);
        event->release();
      }
    } catch (const EventTooLarge&) {  // between two resizes
    }
    tiers.remove_blocks({made});
  }
}

void shake(Tiers& tiers, std::uint64_t hbm, std::uint64_t dram, const std::atomic<bool>& stop) {
  std::mt19937 rng(99);
  while (!stop) {
    tiers.resize_hbm(hbm / 2 + rng() % (hbm / 2));
    if (rng() % 4 == 0) tiers.resize_dram(rng() % 4 ? dram / 2 + rng() % (dram / 2) : 0);
    tiers.throttle(static_cast<Link>(rng() % 3), rng() % 2 ? 0 : 2e9);
    check(tiers.stats().num_evictions + 1 > 0, "stats");
    tiers.precision();
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
}

void run(const Blocks& blocks, const char* eviction, double seconds, bool close_while_busy) {
  TiersConfig config;
  config.hbm_nbytes = 6 * (kChunk + 2 * kPage);
  config.dram_nbytes = 4 * (kChunk + 2 * kPage);
  config.eviction = eviction;
  config.num_io_threads = 3;
  auto tiers = std::make_shared<Tiers>(config, make_host_device(), [] {});
  tiers->add_blocks(blocks.keys, blocks.extents);
  const auto memory = tiers->hbm_memory();
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < kNumThreads; ++i)
    threads.emplace_back(
        [&, i] { work(*tiers, memory->data(), static_cast<std::uint64_t>(i), stop); });
  threads.emplace_back([&] {
    try {
      make_and_forget(*tiers, blocks, memory->data(), stop);
    } catch (const RuntimeClosed&) {
    }
  });
  std::thread shaker([&] {
    try {
      shake(*tiers, config.hbm_nbytes, config.dram_nbytes, stop);
    } catch (const RuntimeClosed&) {
    }
  });
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  if (close_while_busy) tiers->close();
  stop = true;
  for (std::thread& thread : threads) thread.join();
  shaker.join();
  const TiersStats stats = tiers->stats();
  std::printf("%s: %lu events, %lu hits, %lu in flight, %lu from DRAM, %lu from NVMe, %lu failed\n",
              eviction, stats.num_events, stats.num_hbm_hits, stats.num_in_flight,
              stats.num_dram_hits, stats.num_nvme_reads, stats.num_failed);
  if (close_while_busy) return;
  tiers->resize_hbm(config.hbm_nbytes);
  tiers->remove_space(0);
  check(tiers->hbm_nbytes_used() == 0 && tiers->dram_nbytes_used() == 0, "a block stayed behind");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const Blocks blocks = write_blocks(argv[1]);
  const double seconds = std::atof(argv[2]) / 4;
  run(blocks, "lru", seconds, false);
  run(blocks, "per-layer(lru)", seconds, true);
  run(blocks, "fifo", seconds, true);
  run(blocks, "per-layer(fifo)", seconds, false);
  return 0;
}
