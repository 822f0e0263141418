#include "checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define TIERED_MEM_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define TIERED_MEM_CRC_TARGET __attribute__((target("+crc")))
#endif

namespace tiered_mem {
namespace {

uint64_t load64(const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Slicing-by-8 (Kounavis and Berry, 2005): table[k][b] is byte b followed by k zero bytes.
struct SlicingTables {
  std::array<std::array<uint32_t, 256>, 8> table;

  SlicingTables() {
    constexpr uint32_t kReversedPolynomial = 0x82F63B78;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kReversedPolynomial : 0);
      table[0][byte] = crc;
    }
    for (size_t k = 1; k < 8; ++k) {
      for (size_t byte = 0; byte < 256; ++byte) {
        const uint32_t crc = table[k - 1][byte];
        table[k][byte] = (crc >> 8) ^ table[0][crc & 0xFF];
      }
    }
  }
};

uint32_t update_software(uint32_t crc, const unsigned char* p, size_t nbytes) {
  static const SlicingTables tables;
  const auto& t = tables.table;
  for (; nbytes >= 8; p += 8, nbytes -= 8) {
    const uint64_t word = load64(p) ^ crc;
    crc = t[7][word & 0xFF] ^ t[6][word >> 8 & 0xFF] ^ t[5][word >> 16 & 0xFF] ^
          t[4][word >> 24 & 0xFF] ^ t[3][word >> 32 & 0xFF] ^ t[2][word >> 40 & 0xFF] ^
          t[1][word >> 48 & 0xFF] ^ t[0][word >> 56];
  }
  for (; nbytes > 0; ++p, --nbytes) crc = (crc >> 8) ^ t[0][(crc ^ *p) & 0xFF];
  return crc;
}

#ifdef TIERED_MEM_CRC_TARGET

#if defined(__x86_64__)
bool has_crc_instruction() { return __builtin_cpu_supports("sse4.2"); }
TIERED_MEM_CRC_TARGET inline uint64_t step8(uint64_t crc, uint64_t word) {
  return _mm_crc32_u64(crc, word);
}
TIERED_MEM_CRC_TARGET inline uint64_t step1(uint64_t crc, unsigned char byte) {
  return _mm_crc32_u8(static_cast<uint32_t>(crc), byte);
}
#else
bool has_crc_instruction() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }
TIERED_MEM_CRC_TARGET inline uint64_t step8(uint64_t crc, uint64_t word) {
  return __crc32cd(static_cast<uint32_t>(crc), word);
}
TIERED_MEM_CRC_TARGET inline uint64_t step1(uint64_t crc, unsigned char byte) {
  return __crc32cb(static_cast<uint32_t>(crc), byte);
}
#endif

TIERED_MEM_CRC_TARGET uint64_t update_serial(uint64_t crc, const unsigned char* p, size_t nbytes) {
  for (; nbytes >= 8; p += 8, nbytes -= 8) crc = step8(crc, load64(p));
  for (; nbytes > 0; ++p, --nbytes) crc = step1(crc, *p);
  return crc;
}

constexpr size_t kLane = 1024;

// What a CRC state becomes after kLane zero bytes. The map is linear over GF(2), so the images of
// the 32 single-bit states, gathered by byte, give every other by four lookups.
struct LaneShift {
  std::array<std::array<uint32_t, 256>, 4> table{};

  LaneShift() {
    static const unsigned char zeros[kLane] = {};
    for (size_t byte = 0; byte < 4; ++byte) {
      for (size_t bit = 0; bit < 8; ++bit) {
        const uint64_t state = uint64_t{1} << (8 * byte + bit);
        const auto image = static_cast<uint32_t>(update_serial(state, zeros, kLane));
        for (size_t value = 0; value < 256; ++value) {
          if (value >> bit & 1) table[byte][value] ^= image;
        }
      }
    }
  }

  uint32_t operator()(uint64_t crc) const {
    return table[0][crc & 0xFF] ^ table[1][crc >> 8 & 0xFF] ^ table[2][crc >> 16 & 0xFF] ^
           table[3][crc >> 24 & 0xFF];
  }
};

// The instruction takes three cycles and starts every cycle: three independent lanes keep it busy
// (Gopal et al., "Fast CRC computation for iSCSI polynomial", 2011). Short lanes defeat the
// hardware prefetcher, and bytes that a device has just written lie in no near cache: fetching the
// next block in plain order while this one is summed is worth a factor of 2 to 3 there.
TIERED_MEM_CRC_TARGET uint32_t update_hardware(uint32_t seed, const unsigned char* p,
                                               size_t nbytes) {
  constexpr size_t kBlock = 3 * kLane, kCacheLine = 64;
  static const LaneShift shift;
  uint64_t crc = seed;
  for (; nbytes >= kBlock; p += kBlock, nbytes -= kBlock) {
    uint64_t second = 0, third = 0;
    const unsigned char* ahead = p + kBlock;
    for (const unsigned char* q = p; q < p + kLane; ahead += 3 * kCacheLine) {
      for (size_t line = 0; line < 3; ++line) __builtin_prefetch(ahead + line * kCacheLine);
      for (const unsigned char* end = q + kCacheLine; q < end; q += 8) {
        crc = step8(crc, load64(q));
        second = step8(second, load64(q + kLane));
        third = step8(third, load64(q + 2 * kLane));
      }
    }
    crc = shift(shift(crc) ^ second) ^ third;
  }
  return static_cast<uint32_t>(update_serial(crc, p, nbytes));
}

#endif  // TIERED_MEM_CRC_TARGET

}  // namespace

uint32_t crc32c_software(const void* data, size_t nbytes, uint32_t seed) {
  return ~update_software(~seed, static_cast<const unsigned char*>(data), nbytes);
}

uint32_t crc32c(const void* data, size_t nbytes, uint32_t seed) {
#ifdef TIERED_MEM_CRC_TARGET
  static const bool hardware = has_crc_instruction();
  if (hardware) return ~update_hardware(~seed, static_cast<const unsigned char*>(data), nbytes);
#endif
  return crc32c_software(data, nbytes, seed);
}

}  // namespace tiered_mem
