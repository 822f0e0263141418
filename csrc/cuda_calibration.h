// Measures how fast each way of copying is on this device and its link.
#pragma once

#include <vector>

#include "copy_method.h"
#include "cuda_lane.h"

namespace tiered_mem::cuda {

struct Calibration {
  std::vector<CopyTime> times;
  double in_bytes_per_second = 0;      // of the largest copies, the other direction idle
  double duplex_bytes_per_second = 0;  // the same beside copies out
};

/// Copies blocks of 4 KiB to 16 MiB, one and many at a time, by every available method in both
/// directions; takes about a second. What else is copied meanwhile falsifies it. Needs the context
/// to be current and 64 MiB each of device and host memory. Throws DeviceError, BudgetError,
/// TransferError.
Calibration calibrate(const std::shared_ptr<const Context>& context, Events& events, Lane& in,
                      Lane& out, const CopyMethodSet& available);

}  // namespace tiered_mem::cuda
