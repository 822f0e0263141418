// Streams, events and what comes before what.
#include <algorithm>
#include <cstdio>
#include <thread>

#include "machine.h"

namespace cuda_double {

namespace {

/// Accesses are forgotten beyond so many, the finished ones first.
constexpr std::size_t kMaxKnown = 8192;

std::uint64_t at(const Clock& clock, std::size_t stream) {
  return stream < clock.size() ? clock[stream] : 0;
}

void merge(Clock& into, const Clock& clock) {
  into.resize(std::max(into.size(), clock.size()));
  for (std::size_t i = 0; i < clock.size(); ++i) into[i] = std::max(into[i], clock[i]);
}

bool clash(const Access& a, const Access& b) {
  return (a.writes || b.writes) && a.data < b.data + b.nbytes && b.data < a.data + a.nbytes;
}

}  // namespace

Stream* Machine::stream(CUstream handle) {
  const auto found = streams_.find(handle);
  return found == streams_.end() ? nullptr : found->second.get();
}

StreamPtr Machine::start_stream(bool blocking) {
  const StreamPtr stream(new Stream{num_streams_++, blocking});
  stream->rng.seed(static_cast<std::uint64_t>(settings_.at("seed")) * 1000 + stream->number);
  std::thread([this, stream] { serve(stream); }).detach();
  return stream;
}

CUresult Machine::create_stream(bool blocking, CUstream* handle) {
  const Lock lock(mutex_);
  const StreamPtr stream = start_stream(blocking);
  *handle = reinterpret_cast<CUstream>(stream.get());
  streams_[*handle] = stream;
  ++counts_["live_streams"];
  return CUDA_SUCCESS;
}

CUresult Machine::destroy_stream(CUstream handle) {
  const Lock lock(mutex_);
  Stream* const found = handle ? stream(handle) : nullptr;
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  found->closing = true;  // its thread ends behind its work
  found->given.notify_all();
  streams_.erase(handle);
  --counts_["live_streams"];
  return CUDA_SUCCESS;
}

/// Appends to a stream. What the host has seen end comes before it, and what is before it in the
/// stream; the default stream is in order with all blocking ones.
PointPtr Machine::give(Stream& stream, std::function<void()> run,
                       const std::vector<RangePtr>& ranges, const std::vector<Access>& accesses) {
  std::vector<PointPtr> after;
  if (stream.number == 0) {
    for (const auto& [handle, other] : streams_)
      if (other->blocking && other->number) after.push_back(other->tail);
  } else if (stream.blocking) {
    after.push_back(streams_.at(nullptr)->tail);
  }
  merge(stream.clock, observed_);
  for (const PointPtr& point : after) merge(stream.clock, point->clock);
  stream.clock.resize(std::max(stream.clock.size(), stream.number + 1));
  ++stream.clock[stream.number];
  stream.tail = std::make_shared<Point>(Point{stream.clock});
  note(accesses, stream.number, stream.tail);
  for (const RangePtr& range : ranges) ++range->num_pending;
  stream.queue.push_back({std::move(after), std::move(run), ranges, stream.tail});
  stream.given.notify_all();
  return stream.tail;
}

void Machine::serve(StreamPtr stream) {
  Lock lock(mutex_);
  while (true) {
    stream->given.wait(lock, [&] { return stream->closing || !stream->queue.empty(); });
    if (stream->queue.empty()) return;
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    for (const PointPtr& point : work.after)
      changed_.wait(lock, [&] { return point->reached || error_; });
    if (work.run && !error_) {
      lock.unlock();
      work.run();
      lock.lock();
    }
    for (const RangePtr& range : work.ranges) --range->num_pending;
    work.done->reached = true;
    work.done->when = std::chrono::steady_clock::now();
    changed_.notify_all();
  }
}

/// Counts accesses that clash with earlier ones and have no order with them.
void Machine::note(const std::vector<Access>& accesses, std::size_t stream, const PointPtr& point) {
  for (const Access& access : accesses)
    for (const Known& known : known_) {
      if (known.stream == stream || !clash(access, known.access)) continue;
      if (at(point->clock, known.stream) >= at(known.point->clock, known.stream)) continue;
      if (at(known.point->clock, stream) >= at(point->clock, stream)) continue;
      if (counts_["races"]++ < 5)
        std::fprintf(stderr,
                     "cuda_double: a race: %lu bytes at %p are %s in stream %zu and %s in stream "
                     "%zu with no order between them\n",
                     access.nbytes, static_cast<const void*>(access.data),
                     access.writes ? "written" : "read", stream,
                     known.access.writes ? "written" : "read", known.stream);
    }
  for (const Access& access : accesses) known_.push_back({access, stream, point});
  if (known_.size() <= kMaxKnown) return;
  known_.erase(std::remove_if(known_.begin(), known_.end(),
                              [](const Known& known) { return known.point->reached; }),
               known_.end());
}

void Machine::observe(const Clock& clock) {
  merge(observed_, clock);
  known_.erase(std::remove_if(known_.begin(), known_.end(),
                              [this](const Known& known) {
                                return at(observed_, known.stream) >=
                                       at(known.point->clock, known.stream);
                              }),
               known_.end());
}

CUresult Machine::await(Lock& lock, const PointPtr& point) {
  changed_.wait(lock, [&] { return point->reached || error_; });
  if (error_) return error_;
  observe(point->clock);
  return CUDA_SUCCESS;
}

CUresult Machine::query(CUstream handle) {
  const Lock lock(mutex_);
  Stream* const found = stream(handle);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (!found->tail->reached) return CUDA_ERROR_NOT_READY;
  observe(found->tail->clock);
  return CUDA_SUCCESS;
}

CUresult Machine::synchronize(CUstream handle) {
  Lock lock(mutex_);
  Stream* const found = stream(handle);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  ++counts_["waits"];
  return await(lock, give(*found, nullptr, {}, {}));
}

CUresult Machine::synchronize() {
  Lock lock(mutex_);
  ++counts_["waits"];
  std::vector<PointPtr> tails;
  for (const auto& [handle, stream] : streams_) tails.push_back(stream->tail);
  for (const PointPtr& tail : tails)
    if (const CUresult result = await(lock, tail)) return result;
  return CUDA_SUCCESS;
}

Event* Machine::event(CUevent handle) {
  const auto found = events_.find(reinterpret_cast<Event*>(handle));
  return found == events_.end() ? nullptr : *found;
}

CUresult Machine::create_event(unsigned flags, CUevent* handle) {
  const Lock lock(mutex_);
  *handle = reinterpret_cast<CUevent>(*events_.insert(new Event{flags, nullptr}).first);
  ++counts_["live_events"];
  return CUDA_SUCCESS;
}

CUresult Machine::destroy_event(CUevent handle) {
  const Lock lock(mutex_);
  Event* const found = event(handle);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  events_.erase(found);
  delete found;  // streams that were told to wait hold its point
  --counts_["live_events"];
  return CUDA_SUCCESS;
}

CUresult Machine::record(CUevent handle, CUstream into) {
  const Lock lock(mutex_);
  Event* const found = event(handle);
  Stream* const target = stream(into);
  if (!found || !target) return CUDA_ERROR_INVALID_HANDLE;
  found->point = give(*target, nullptr, {}, {});
  return CUDA_SUCCESS;
}

CUresult Machine::hold(CUstream into, CUevent handle) {
  const Lock lock(mutex_);
  Event* const found = event(handle);
  Stream* const target = stream(into);
  if (!found || !target) return CUDA_ERROR_INVALID_HANDLE;
  ++counts_["stream_waits"];
  if (!found->point) return CUDA_SUCCESS;  // never recorded: nothing to wait for
  merge(target->clock, found->point->clock);
  give(*target, nullptr, {}, {});
  target->queue.back().after.push_back(found->point);
  return CUDA_SUCCESS;
}

CUresult Machine::query(CUevent handle) {
  const Lock lock(mutex_);
  Event* const found = event(handle);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (!found->point) return CUDA_SUCCESS;
  if (!found->point->reached) return CUDA_ERROR_NOT_READY;
  observe(found->point->clock);
  return CUDA_SUCCESS;
}

CUresult Machine::synchronize(CUevent handle) {
  Lock lock(mutex_);
  Event* const found = event(handle);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  ++counts_["waits"];
  return found->point ? await(lock, PointPtr(found->point)) : CUDA_SUCCESS;
}

CUresult Machine::elapsed(CUevent start, CUevent end, float* milliseconds) {
  const Lock lock(mutex_);
  Event *const from = event(start), *const to = event(end);
  if (!from || !to || (from->flags | to->flags) & CU_EVENT_DISABLE_TIMING)
    return CUDA_ERROR_INVALID_HANDLE;
  if (!from->point || !to->point) return CUDA_ERROR_INVALID_HANDLE;
  if (!from->point->reached || !to->point->reached) return CUDA_ERROR_NOT_READY;
  const std::chrono::duration<float, std::milli> passed = to->point->when - from->point->when;
  *milliseconds = passed.count();
  return CUDA_SUCCESS;
}

}  // namespace cuda_double
