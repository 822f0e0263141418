// Hammers the runtime from several threads, to be built with -fsanitize=thread or
// address,undefined. Exits with 0 if every slot held its block's bytes.
//
//   stress FILE SECONDS
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "checksum.h"
#include "error.h"
#include "tiers.h"

using namespace tiered_mem;

namespace {

constexpr int kNumLayers = 4, kNumExperts = 16, kNumThreads = 4, kTopK = 3;

Key key_of(int space, int layer, int index) {
  return Key{1} << 56 | Key(space) << 48 | Key(layer) << 32 | Key(index);
}
std::uint64_t nbytes_of(int layer) {
  // Two size classes; one of more than a chunk.
  return layer ? 3 * kPage - 100 : kChunk + 2 * kPage;
}
std::byte byte_of(Key key, std::uint64_t at) {
  return static_cast<std::byte>((key ^ key >> 27) * 31 + at / 512);
}

struct Blocks {
  std::vector<Key> keys;
  std::vector<std::shared_ptr<const Extent>> extents;
};

// Every 40th block is damaged: its transfers fail.
bool damaged(int layer, int index) { return (layer * kNumExperts + index) % 40 == 39; }

Blocks write_blocks(const std::string& path) {
  Blocks blocks;
  std::ofstream out(path, std::ios::binary);
  struct Place {
    std::uint64_t offset;
    std::vector<std::uint32_t> table;
  };
  std::vector<Place> places;
  std::uint64_t offset = 0;
  for (int layer = 0; layer < kNumLayers; ++layer)
    for (int index = 0; index < kNumExperts; ++index) {
      const Key key = key_of(0, layer, index);
      std::vector<std::byte> data(nbytes_of(layer));
      for (std::uint64_t at = 0; at < data.size(); ++at) data[at] = byte_of(key, at);
      Place place{offset, {}};
      for (std::uint64_t at = 0; at < data.size(); at += kChunk) {
        const auto n = static_cast<std::uint32_t>(std::min(kChunk, data.size() - at));
        const std::uint32_t crc = crc32c(data.data() + at, n) ^ damaged(layer, index);
        place.table.insert(place.table.end(), {n, n, crc});
      }
      data.resize(round_to_pages(data.size()));
      out.write(reinterpret_cast<const char*>(data.data()), static_cast<long>(data.size()));
      offset += data.size();
      blocks.keys.push_back(key);
      places.push_back(place);
    }
  out.close();
  const auto file = std::make_shared<File>(path);
  for (std::size_t i = 0; i < places.size(); ++i)
    blocks.extents.push_back(std::make_shared<Extent>(
        make_extent(file, Codec::none, nbytes_of(static_cast<int>(i) / kNumExperts),
                    places[i].offset, places[i].table.data(), places[i].table.size() / 3)));
  return blocks;
}

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "WRONG: %s\n", what);
  std::abort();
}

std::vector<Key> sample(std::mt19937& rng, int layer, int count) {
  std::vector<Key> keys;
  for (int index = 0; index < kNumExperts; ++index) keys.push_back(key_of(0, layer, index));
  std::shuffle(keys.begin(), keys.end(), rng);
  keys.resize(static_cast<std::size_t>(count));
  return keys;
}

void fill(Key key, std::byte* block) {
  const int layer = static_cast<int>(key >> 32 & 0xFFFF);
  for (std::uint64_t at = 0; at < nbytes_of(layer); ++at) block[at] = byte_of(key, at);
}

void check_bytes(Key key, const std::byte* block) {
  const int layer = static_cast<int>(key >> 32 & 0xFFFF);
  const std::uint64_t nbytes = nbytes_of(layer);
  for (std::uint64_t at = 0; at < nbytes; at += at + 997 < nbytes ? 997 : 1)
    check(block[at] == byte_of(key, at), "a slot's bytes");
}

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
