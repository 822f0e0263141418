#include "bounds.h"

#include <algorithm>
#include <utility>

#include "error.h"

namespace tiered_mem {

namespace {

// Windows take about so many accesses: some tenths of a second.
constexpr std::size_t kMaxAccesses = std::size_t{1} << 24;
constexpr std::size_t kMinReach = 8;

std::size_t largest_power_of_two_in(std::size_t number) { return number & (~number + 1); }

// A window reaches `reach` times as far as the largest power of two in the number of its start. So
// there are windows of every length, with reach / 2 starts in the length of one, and each doubling
// of the length takes reach / 2 passes over the trace.
std::size_t choose_reach(const Future& future) {
  std::size_t num_doublings = 1;
  while (future.num_events() >> num_doublings) ++num_doublings;
  const std::size_t num_accesses = future.num_accesses() * num_doublings + 1;
  return std::max(kMinReach, 2 * kMaxAccesses / num_accesses);
}

}  // namespace

Future::Future(const std::vector<std::int64_t>& offsets, std::vector<std::uint32_t> blocks,
               std::vector<std::uint64_t> sizes)
    : offsets_(offsets.begin(), offsets.end()),
      blocks_(std::move(blocks)),
      sizes_(std::move(sizes)),
      next_(blocks_.size()) {
  if (offsets_.empty() || offsets_.front() != 0 || offsets_.back() != blocks_.size() ||
      !std::is_sorted(offsets_.begin(), offsets_.end()) || offsets_.size() > kNever)
    throw ConfigError("the offsets of events don't cut the accesses into events");
  std::vector<std::uint32_t> seen(sizes_.size(), kNever);
  for (std::size_t event = num_events(); event-- > 0;) {
    for (std::size_t i = begin(event); i < end(event); ++i) {
      if (blocks_[i] >= seen.size()) throw ConfigError("an access is to a block that has no size");
      if (seen[blocks_[i]] == event) throw ConfigError("an event names a block twice");
      next_[i] = std::exchange(seen[blocks_[i]], static_cast<std::uint32_t>(event));
    }
  }
  nbytes_before_.reserve(offsets_.size());
  nbytes_before_.push_back(0);
  for (std::size_t event = 0; event < num_events(); ++event) {
    std::uint64_t nbytes = nbytes_before_.back();
    for (std::size_t i = begin(event); i < end(event); ++i) nbytes += size(i);
    nbytes_before_.push_back(nbytes);
  }
}

BeladyCache::BeladyCache(const Future& future, std::uint64_t capacity, BeladyRules rules)
    : future_(future),
      capacity_(capacity),
      rules_(rules),
      kept_(future.num_blocks()),
      next_(future.num_blocks()) {}

std::uint64_t BeladyCache::use(std::size_t event, std::uint64_t* missing) {
  std::uint64_t nbytes_missing = 0;
  for (std::size_t i = future_.begin(event); i < future_.end(event); ++i) {
    std::uint64_t& kept = kept_[future_.block(i)];
    const std::uint64_t lacking = future_.size(i) - kept;
    held_ -= std::exchange(kept, 0);
    nbytes_missing += lacking;
    if (missing != nullptr) missing[i - future_.begin(event)] = lacking;
  }
  shrink(room_beside(event));
  for (std::size_t i = future_.begin(event); i < future_.end(event); ++i)
    if (future_.next(i) != Future::kNever && future_.size(i) <= capacity_)
      keep(future_.block(i), future_.next(i), future_.size(i));
  shrink(capacity_);
  return nbytes_missing;
}

bool BeladyCache::start_after(std::size_t event, std::size_t end) {
  std::uint64_t room = room_beside(event);
  if (future_.nbytes_before(end) - future_.nbytes_before(event + 1) <= room) return false;
  clear();
  for (std::size_t i = future_.begin(event); i < future_.end(event); ++i)
    if (future_.next(i) < end) keep(future_.block(i), future_.next(i), future_.size(i));
  for (std::size_t later = event + 1; later < end; ++later) {
    for (std::size_t i = future_.begin(later); i < future_.end(later); ++i) {
      const std::uint32_t block = future_.block(i);
      if (kept_[block] > 0) continue;
      const std::uint64_t nbytes = std::min(future_.size(i), room);
      if (nbytes > 0) keep(block, static_cast<std::uint32_t>(later), nbytes);
      room -= nbytes;
      if (nbytes == future_.size(i)) continue;
      shrink(capacity_);
      return true;
    }
  }
  return false;
}

std::uint64_t BeladyCache::room_beside(std::size_t event) const {
  const std::uint64_t own = future_.nbytes_before(event + 1) - future_.nbytes_before(event);
  return own <= std::min(rules_.pinned_nbytes, capacity_) ? capacity_ - own : capacity_;
}

void BeladyCache::keep(std::uint32_t block, std::uint32_t next, std::uint64_t nbytes) {
  kept_[block] = nbytes;
  next_[block] = next;
  held_ += nbytes;
  heap_.push_back(std::uint64_t{next} << 32 | block);
  std::push_heap(heap_.begin(), heap_.end());
}

void BeladyCache::shrink(std::uint64_t limit) {
  while (held_ > limit) {
    const auto block = static_cast<std::uint32_t>(heap_.front());
    const bool stands = kept_[block] > 0 && next_[block] == heap_.front() >> 32;
    if (stands) {
      const std::uint64_t excess = held_ - limit;
      const std::uint64_t nbytes = rules_.divisible ? std::min(excess, kept_[block]) : kept_[block];
      kept_[block] -= nbytes;
      held_ -= nbytes;
      if (kept_[block] > 0) return;
    }
    std::pop_heap(heap_.begin(), heap_.end());
    heap_.pop_back();
  }
}

void BeladyCache::clear() {
  for (std::uint64_t entry : heap_) kept_[static_cast<std::uint32_t>(entry)] = 0;
  heap_.clear();
  held_ = 0;
}

std::vector<std::uint64_t> belady(const Future& future, std::uint64_t capacity, BeladyRules rules) {
  BeladyCache cache(future, capacity, rules);
  std::vector<std::uint64_t> missing(future.num_accesses());
  for (std::size_t event = 0; event < future.num_events(); ++event)
    cache.use(event, missing.data() + future.begin(event));
  return missing;
}

double least_seconds(const Future& future, std::uint64_t capacity, std::uint64_t pinned_nbytes,
                     Pace link, const std::vector<double>& work) {
  const std::size_t num_events = future.num_events();
  BeladyCache cache(future, capacity, {pinned_nbytes, /*divisible=*/true});
  const double rate = link.bytes_per_second;

  // ended[e]: a time before which event e can't have ended.
  std::vector<double> ended(num_events);
  std::uint64_t nbytes = 0;
  for (std::size_t event = 0; event < num_events; ++event) {
    nbytes += cache.use(event);
    if (nbytes > 0) ended[event] = link.latency + static_cast<double>(nbytes) / rate;
  }
  // Windows find where the link idles, which it never does if nothing computes.
  const auto computes = [](double seconds) { return seconds > 0; };
  if (std::none_of(work.begin(), work.end(), computes)) return num_events ? ended.back() : 0;

  const std::size_t reach = choose_reach(future);
  for (std::size_t event = 0; event < num_events; ++event) {
    ended[event] = std::max(ended[event], (event ? ended[event - 1] : 0) + work[event]);
    const std::size_t length = reach * largest_power_of_two_in(event + 1);
    const std::size_t end = std::min(num_events, event + 1 + length);
    if (!cache.start_after(event, end)) continue;
    nbytes = 0;
    for (std::size_t later = event + 1; later < end; ++later) {
      nbytes += cache.use(later);
      ended[later] = std::max(ended[later], ended[event] + static_cast<double>(nbytes) / rate);
    }
  }
  return ended.back();
}

}  // namespace tiered_mem
