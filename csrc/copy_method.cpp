#include "copy_method.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "error.h"

namespace tiered_mem {

namespace {

constexpr const char* kMethodNames[] = {"engine", "batch", "kernel"};
constexpr const char* kDirectionNames[] = {"in", "out"};

constexpr std::uint64_t kSmallNbytes = 128 << 10;
constexpr std::uint64_t kManyCopies = 8;
// A kernel takes multiprocessors from what computes: it must be worth it.
constexpr double kKernelGain = 0.95;

}  // namespace

const char* name_of(CopyMethod method) { return kMethodNames[static_cast<std::size_t>(method)]; }
const char* name_of(Direction direction) {
  return kDirectionNames[static_cast<std::size_t>(direction)];
}

CopyMethod copy_method_of(const std::string& name) {
  for (std::size_t i = 0; i < kNumCopyMethods; ++i)
    if (name == kMethodNames[i]) return static_cast<CopyMethod>(i);
  throw ConfigError("unknown copy method '" + name + "'; there are engine, batch, kernel");
}

Direction direction_of(const std::string& name) {
  if (name == "in") return Direction::in;
  if (name == "out") return Direction::out;
  throw ConfigError("unknown direction '" + name + "'; there are in, out");
}

CopyMethods::CopyMethods(const std::vector<CopyTime>& times) {
  std::vector<CopyTime> by_count = times;
  std::stable_sort(by_count.begin(), by_count.end(), [](const CopyTime& a, const CopyTime& b) {
    return a.num_copies < b.num_copies;
  });
  std::map<const Cost*, std::uint64_t> first_counts;
  for (const CopyTime& time : by_count) {
    if (time.nbytes == 0 || time.num_copies == 0 || !std::isfinite(time.seconds) ||
        time.seconds <= 0)
      throw ConfigError("a copy time that can't be: " + std::to_string(time.num_copies) +
                        " blocks of " + std::to_string(time.nbytes) + " bytes in " +
                        std::to_string(time.seconds) + " s; measure again by calibrate()");
    Curve& curve =
        curves_[static_cast<std::size_t>(time.direction)][static_cast<std::size_t>(time.method)];
    const auto [at, added] = curve.try_emplace(time.nbytes);
    Cost& cost = at->second;
    const auto num_copies = static_cast<double>(time.num_copies);
    if (added) {
      cost = {time.seconds / num_copies, time.seconds / num_copies};
      first_counts[&cost] = time.num_copies;
    } else if (time.num_copies > first_counts[&cost]) {
      const auto first_count = static_cast<double>(first_counts[&cost]);
      cost.next =
          std::max(0.0, (time.seconds - cost.first * first_count) / (num_copies - first_count));
    }
  }
}

double CopyMethods::seconds(const Curve& curve, std::uint64_t nbytes, std::uint64_t num_copies) {
  auto above = curve.lower_bound(nbytes);
  const auto of = [&](const Cost& cost) {
    return cost.first + cost.next * static_cast<double>(num_copies - 1);
  };
  if (above == curve.begin()) return of(above->second);
  if (above == curve.end()) {  // larger than all that was measured: as fast as the largest
    const auto& [size, cost] = *std::prev(above);
    return of(cost) * static_cast<double>(nbytes) / static_cast<double>(size);
  }
  const auto& [low, low_cost] = *std::prev(above);
  const auto& [high, high_cost] = *above;
  const double part = static_cast<double>(nbytes - low) / static_cast<double>(high - low);
  return of(low_cost) + part * (of(high_cost) - of(low_cost));
}

CopyMethod CopyMethods::choose(Direction direction, std::uint64_t nbytes, std::uint64_t num_copies,
                               const CopyMethodSet& available) const {
  const auto& curves = curves_[static_cast<std::size_t>(direction)];
  const auto has = [&](CopyMethod method) { return available[static_cast<std::size_t>(method)]; };
  if (curves[0].empty()) {
    if (nbytes >= kSmallNbytes || num_copies < kManyCopies) return CopyMethod::engine;
    if (has(CopyMethod::kernel)) return CopyMethod::kernel;
    return has(CopyMethod::batch) ? CopyMethod::batch : CopyMethod::engine;
  }
  auto best = CopyMethod::engine;
  double least = seconds(curves[0], nbytes, num_copies);
  for (const CopyMethod method : {CopyMethod::batch, CopyMethod::kernel}) {
    const Curve& curve = curves[static_cast<std::size_t>(method)];
    if (!has(method) || curve.empty()) continue;
    const double time = seconds(curve, nbytes, num_copies);
    if (time >= least * (method == CopyMethod::kernel ? kKernelGain : 1.0)) continue;
    best = method;
    least = time;
  }
  return best;
}

}  // namespace tiered_mem
