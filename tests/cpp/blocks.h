// A file of blocks whose bytes follow from their keys, for programs that hammer the runtime.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checksum.h"
#include "direct_io.h"
#include "key.h"
#include "tiers.h"

namespace blocks {

using namespace tiered_mem;

constexpr int kNumLayers = 4, kNumExperts = 16;

inline Key key_of(int space, int layer, int index) {
  return Key{1} << 56 | Key(space) << 48 | Key(layer) << 32 | Key(index);
}
inline std::uint64_t nbytes_of(int layer) {
  // Two size classes; one of more than a chunk.
  return layer ? 3 * kPage - 100 : kChunk + 2 * kPage;
}
inline std::byte byte_of(Key key, std::uint64_t at) {
  return static_cast<std::byte>((key ^ key >> 27) * 31 + at / 512);
}

struct Blocks {
  std::vector<Key> keys;
  std::vector<std::shared_ptr<const Extent>> extents;
};

// Every 40th block is damaged: its transfers fail.
inline bool damaged(int layer, int index) { return (layer * kNumExperts + index) % 40 == 39; }

inline Blocks write_blocks(const std::string& path) {
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

inline void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "WRONG: %s\n", what);
  std::abort();
}

inline std::vector<Key> sample(std::mt19937& rng, int layer, int count) {
  std::vector<Key> keys;
  for (int index = 0; index < kNumExperts; ++index) keys.push_back(key_of(0, layer, index));
  std::shuffle(keys.begin(), keys.end(), rng);
  keys.resize(static_cast<std::size_t>(count));
  return keys;
}

inline void fill(Key key, std::byte* block) {
  const int layer = static_cast<int>(key >> 32 & 0xFFFF);
  for (std::uint64_t at = 0; at < nbytes_of(layer); ++at) block[at] = byte_of(key, at);
}

inline void check_bytes(Key key, const std::byte* block) {
  const int layer = static_cast<int>(key >> 32 & 0xFFFF);
  const std::uint64_t nbytes = nbytes_of(layer);
  for (std::uint64_t at = 0; at < nbytes; at += at + 997 < nbytes ? 997 : 1)
    check(block[at] == byte_of(key, at), "a slot's bytes");
}

}  // namespace blocks
