// Which way of copying a batch of blocks is fastest, by what was measured on the device.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "device.h"

namespace tiered_mem {

/// A copy engine told of every block; of all at once; or a kernel that reads and writes host
/// memory.
enum class CopyMethod : std::uint8_t { engine, batch, kernel };
constexpr std::size_t kNumCopyMethods = 3;

const char* name_of(CopyMethod method);
const char* name_of(Direction direction);
/// Throw ConfigError for names of nothing.
CopyMethod copy_method_of(const std::string& name);
Direction direction_of(const std::string& name);

/// How long a batch of equal blocks took, from telling its first to the arrival of its last.
struct CopyTime {
  Direction direction;
  CopyMethod method;
  std::uint64_t nbytes;  // of a block
  std::uint64_t num_copies;
  double seconds;
};

using CopyMethodSet = std::array<bool, kNumCopyMethods>;

/// Chooses by times that were measured. Each method is taken to need a time for the first block and
/// one for each that follows, both linear in the block's size between measured sizes. The device
/// decides where the crossovers lie; vLLM's curves show how far apart they can be.
///
/// Without times: the kernel, else batches, for eight blocks and more of less than 128 KiB; copy
/// engines keep up with anything else.
class CopyMethods {
 public:
  /// Throws ConfigError for a time that can't be.
  explicit CopyMethods(const std::vector<CopyTime>& times = {});

  CopyMethod choose(Direction direction, std::uint64_t nbytes, std::uint64_t num_copies,
                    const CopyMethodSet& available) const;

 private:
  struct Cost {
    double first = 0;
    double next = 0;
  };
  // By block size.
  using Curve = std::map<std::uint64_t, Cost>;

  static double seconds(const Curve& curve, std::uint64_t nbytes, std::uint64_t num_copies);

  std::array<std::array<Curve, kNumCopyMethods>, 2> curves_;
};

}  // namespace tiered_mem
