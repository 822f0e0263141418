#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tiered_mem {

// CRC-32C (Castagnoli, as in iSCSI) of `nbytes` bytes. `seed` is the result for the bytes before
// them, so that a long input may be summed in pieces.
uint32_t crc32c(const void* data, size_t nbytes, uint32_t seed = 0);

// One way to advance a CRC's state, which is the complement of its result.
struct ChecksumImplementation {
  const char* name;
  uint32_t (*update)(uint32_t state, const unsigned char* data, size_t nbytes);
};

// Those this machine can run, fastest first: crc32c uses the first, tests compare them all.
std::vector<ChecksumImplementation> crc32c_implementations();

}  // namespace tiered_mem
