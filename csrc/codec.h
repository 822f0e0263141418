#pragma once

#include <cstddef>
#include <cstdint>

#include "scratch.h"

namespace tiered_mem {

// How a chunk is stored. The numbers are written into stores: never change their meaning.
enum class Codec : uint8_t {
  none = 0,
  zstd = 1,
  zstd_planes2 = 2,  // first bytes of all 2-byte elements, then second bytes, then an odd tail byte
};

// Decodes one chunk. `raw` receives exactly `raw_nbytes`.
// Throws StoreError if libzstd is missing or the stored bytes don't decode to that size.
void decode(Codec codec, const void* stored, size_t stored_nbytes, void* raw, size_t raw_nbytes,
            Scratch& scratch);

}  // namespace tiered_mem
