#include "cuda_calibration.h"

#include <algorithm>
#include <chrono>

#include "cuda_memory.h"

namespace tiered_mem::cuda {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kKiB = 1024;
constexpr std::uint64_t kMiB = 1024 * kKiB;
// Dense where batched copies have their cliff.
constexpr std::uint64_t kSizes[] = {4 * kKiB,   8 * kKiB,  16 * kKiB,  24 * kKiB,
                                    32 * kKiB,  64 * kKiB, 128 * kKiB, 256 * kKiB,
                                    512 * kKiB, 1 * kMiB,  4 * kMiB,   16 * kMiB};
constexpr std::uint64_t kBufferNbytes = 32 * kMiB;  // two of the largest blocks
constexpr std::uint64_t kMostCopies = 512;
constexpr int kNumRounds = 3;
constexpr double kRoundsSeconds = 0.01;  // no further round of a size after this

class DeviceBuffer {
 public:
  DeviceBuffer(std::shared_ptr<const Context> context, std::uint64_t nbytes)
      : context_(std::move(context)) {
    context_->api().check(context_->api().cuMemAlloc(&address_, nbytes),
                          "no device memory to calibrate copies in; free some, or calibrate "
                          "before the model is loaded");
  }
  ~DeviceBuffer() { context_->api().cuMemFree(address_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  CUdeviceptr address() const { return address_; }

 private:
  const std::shared_ptr<const Context> context_;
  CUdeviceptr address_ = 0;
};

// Blocks in rising order on the host and falling on the device, as scattered as real ones.
std::vector<Piece> scattered(std::byte* host, CUdeviceptr device, std::uint64_t nbytes,
                             std::uint64_t count) {
  std::vector<Piece> pieces;
  for (std::uint64_t i = 0; i < count; ++i) {
    std::byte* from = host + i * nbytes;
    pieces.push_back(
        {from, device + (count - 1 - i) * nbytes, reinterpret_cast<std::uint64_t>(from), nbytes});
  }
  return pieces;
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The least of a few rounds: what disturbs only adds.
double measure(Events& events, Lane& lane, CopyMethod method, const std::vector<Piece>& pieces) {
  double least = 0;
  const auto begin = Clock::now();
  for (int round = 0; round < kNumRounds; ++round) {
    const auto start = Clock::now();
    events.wait(lane.copy(method, pieces, {}));
    const double seconds = seconds_since(start);
    least = round == 0 ? seconds : std::min(least, seconds);
    if (seconds_since(begin) > kRoundsSeconds) break;
  }
  return std::max(least, 1e-9);
}

}  // namespace

Calibration calibrate(const std::shared_ptr<const Context>& context, Events& events, Lane& in,
                      Lane& out, const CopyMethodSet& available) {
  const auto ranges = std::make_shared<PinnedRanges>();
  const auto host_in = allocate_pinned(context, ranges, kBufferNbytes);
  const auto host_out = allocate_pinned(context, ranges, kBufferNbytes);
  const DeviceBuffer device_in(context, kBufferNbytes);
  const DeviceBuffer device_out(context, kBufferNbytes);
  const auto pieces_of = [&](Direction direction, std::uint64_t nbytes, std::uint64_t count) {
    return direction == Direction::in
               ? scattered(host_in->data(), device_in.address(), nbytes, count)
               : scattered(host_out->data(), device_out.address(), nbytes, count);
  };

  Calibration found;
  for (const Direction direction : {Direction::in, Direction::out}) {
    Lane& lane = direction == Direction::in ? in : out;
    for (std::size_t i = 0; i < kNumCopyMethods; ++i) {
      if (!available[i]) continue;
      const auto method = static_cast<CopyMethod>(i);
      measure(events, lane, method, pieces_of(direction, kSizes[0], 2));  // what's lazy in it
      for (const std::uint64_t nbytes : kSizes) {
        const std::uint64_t most = std::min(kMostCopies, kBufferNbytes / nbytes);
        for (const std::uint64_t count : {std::uint64_t{1}, most})
          found.times.push_back(
              {direction, method, nbytes, count,
               measure(events, lane, method, pieces_of(direction, nbytes, count))});
      }
    }
  }

  const std::vector<Piece> large_in = pieces_of(Direction::in, 16 * kMiB, 2);
  const std::vector<Piece> large_out = pieces_of(Direction::out, 16 * kMiB, 2);
  const double alone = measure(events, in, CopyMethod::engine, large_in);
  // Twice the bytes go out, so that they are still going when the last has come in.
  out.copy(CopyMethod::engine, large_out, {});
  const MarkPtr last_out = out.copy(CopyMethod::engine, large_out, {});
  const auto start = Clock::now();
  events.wait(in.copy(CopyMethod::engine, large_in, {}));
  const double beside = std::max(seconds_since(start), 1e-9);
  events.wait(last_out);
  found.in_bytes_per_second = static_cast<double>(kBufferNbytes) / alone;
  found.duplex_bytes_per_second = static_cast<double>(kBufferNbytes) / beside;
  return found;
}

}  // namespace tiered_mem::cuda
