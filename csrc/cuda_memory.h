// Page-locked host memory, which copies to and from a CUDA device reach without a detour.
#pragma once

#include <memory>

#include "cuda_context.h"
#include "pinned_ranges.h"

namespace tiered_mem::cuda {

/// New memory, entered into `ranges`. Throws BudgetError.
std::shared_ptr<Memory> allocate_pinned(std::shared_ptr<const Context> context,
                                        std::shared_ptr<PinnedRanges> ranges, std::uint64_t nbytes);

/// Pins memory that is there, while the handle lives. Throws DeviceError.
std::shared_ptr<void> pin(std::shared_ptr<const Context> context,
                          std::shared_ptr<PinnedRanges> ranges, std::byte* host,
                          std::uint64_t nbytes);

}  // namespace tiered_mem::cuda
