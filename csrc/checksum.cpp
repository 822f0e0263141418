#include "checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
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

constexpr uint32_t kReversedPolynomial = 0x82F63B78;

// Slicing-by-8 (Kounavis and Berry, 2005): table[k][b] is byte b followed by k zero bytes.
struct SlicingTables {
  std::array<std::array<uint32_t, 256>, 8> table;

  SlicingTables() {
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

#if defined(__x86_64__)

// x^degree modulo the polynomial, bit-reversed, as carry-less multiplication wants it.
uint64_t power_of_x(unsigned degree) {
  uint32_t value = 0x80000000;
  for (; degree > 0; --degree) value = (value >> 1) ^ (value & 1 ? kReversedPolynomial : 0);
  return uint64_t{value} << 1;
}

// Folds 256 bytes a step by 512-bit carry-less multiplication (Gopal et al., "Fast CRC computation
// for generic polynomials using PCLMULQDQ", 2009): about as fast as memory. What is folded keeps
// the CRC of the bytes it stands for, so the instruction finishes it like any other input.
__attribute__((target("avx512f,vpclmulqdq,sse4.2"))) uint32_t update_wide(uint32_t seed,
                                                                          const unsigned char* p,
                                                                          size_t nbytes) {
  constexpr size_t kStep = 256, kVector = 64;
  if (nbytes < 2 * kStep) return update_hardware(seed, p, nbytes);
  static const uint64_t fold_low = power_of_x(8 * kStep + 32);
  static const uint64_t fold_high = power_of_x(8 * kStep - 32);
  const auto low = static_cast<long long>(fold_low), high = static_cast<long long>(fold_high);
  const __m512i fold = _mm512_set4_epi64(high, low, high, low);
  __m512i sums[kStep / kVector];
  for (size_t i = 0; i < 4; ++i) sums[i] = _mm512_loadu_si512(p + i * kVector);
  sums[0] = _mm512_xor_si512(sums[0],
                             _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int32_t>(seed))));
  for (p += kStep, nbytes -= kStep; nbytes >= kStep; p += kStep, nbytes -= kStep) {
    for (size_t i = 0; i < 4; ++i) {
      constexpr int kXorOfThree = 0x96;
      sums[i] = _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(sums[i], fold, 0x00),
                                          _mm512_clmulepi64_epi128(sums[i], fold, 0x11),
                                          _mm512_loadu_si512(p + i * kVector), kXorOfThree);
    }
  }
  unsigned char folded[kStep];
  for (size_t i = 0; i < 4; ++i) _mm512_storeu_si512(folded + i * kVector, sums[i]);
  const auto crc = static_cast<uint32_t>(update_serial(0, folded, kStep));
  return static_cast<uint32_t>(update_serial(crc, p, nbytes));
}

#endif  // __x86_64__

}  // namespace

std::vector<ChecksumImplementation> crc32c_implementations() {
  std::vector<ChecksumImplementation> usable;
#if defined(__x86_64__)
  if (has_crc_instruction() && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("vpclmulqdq")) {
    usable.push_back({"folding", update_wide});
  }
#endif
#ifdef TIERED_MEM_CRC_TARGET
  if (has_crc_instruction()) usable.push_back({"instruction", update_hardware});
#endif
  usable.push_back({"tables", update_software});
  return usable;
}

uint32_t crc32c(const void* data, size_t nbytes, uint32_t seed) {
  static const auto update = crc32c_implementations().front().update;
  return ~update(~seed, static_cast<const unsigned char*>(data), nbytes);
}

}  // namespace tiered_mem
