#pragma once

#include <cstddef>
#include <cstdint>

namespace tiered_mem {

// CRC-32C (Castagnoli, as in iSCSI) of `nbytes` bytes. `seed` is the result for the bytes before
// them, so that a long input may be summed in pieces.
uint32_t crc32c(const void* data, size_t nbytes, uint32_t seed = 0);

// The same by table lookups alone: the peer that crc32c is tested against.
uint32_t crc32c_software(const void* data, size_t nbytes, uint32_t seed = 0);

}  // namespace tiered_mem
