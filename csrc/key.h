// Names of blocks, packed into 64 bits: kind 8, space 8, layer 16, index 32.
#pragma once

#include <cstdint>

namespace tiered_mem {

using Key = std::uint64_t;

/// Names no block.
constexpr Key kNoKey = ~Key{0};

/// Kind, space and layer of a block: the unit in which use is predicted and shares are given.
using Partition = std::uint32_t;

inline Partition partition_of(Key key) { return static_cast<Partition>(key >> 32); }
inline std::uint8_t space_of(Key key) { return static_cast<std::uint8_t>(key >> 48); }

}  // namespace tiered_mem
