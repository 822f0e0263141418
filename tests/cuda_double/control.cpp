// Settings, counts and failures that are asked for.
//
// By the environment before the library is loaded, TIERED_MEM_CUDA_DOUBLE="name=value,...", and by
// the functions at the end, which tests call by ctypes or dlsym. Settings:
//
//   seed, max_delay_us          of the streams' delays
//   memory, host_memory         bytes there are of the device's, and of what cuMemHostAlloc gives
//   driver_version, num_devices, capability (90: sm_90), integrated, pageable_access
//   guard                       the host can't touch device memory (no kernels then)
//   fail_copy=N, fail_code      the N-th copy from now fails when it runs, and the device with it
//   hang_copy=N                 the N-th copy from now never ends
//   missing=FUNCTION            the driver has no such function          (environment only)
//   fail=FUNCTION:N:CODE        the N-th call of it from now fails       (environment only)
//
// Counts: copies, nbytes_copied, batches, launches, pageable_copies, waits (of the host),
// stream_waits, races, freed_in_use, live_streams, live_events, live_allocations,
// live_host_allocations, live_registrations, live_modules, live_contexts, registered_nbytes, and
// of each driver function how often it was called.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "machine.h"

namespace cuda_double {

namespace {

[[noreturn]] void refuse(const std::string& what) {
  std::fprintf(stderr, "cuda_double: TIERED_MEM_CUDA_DOUBLE says \"%s\", which isn't known\n",
               what.c_str());
  std::abort();
}

}  // namespace

Machine& machine() {
  static Machine* const one = new Machine;
  return *one;
}

CUcontext& current_context() {
  static thread_local CUcontext context = nullptr;
  return context;
}

Machine::Machine()
    : settings_{{"seed", 1},
                {"max_delay_us", 200},
                {"memory", 1 << 30},
                {"host_memory", 1ll << 40},
                {"driver_version", 13000},
                {"num_devices", 1},
                {"capability", 90},
                {"integrated", 0},
                {"pageable_access", 0},
                {"guard", 0},
                {"fail_copy", 0},
                {"fail_code", 214},
                {"hang_copy", 0}} {
  const char* const said = std::getenv("TIERED_MEM_CUDA_DOUBLE");
  std::istringstream items(said ? said : "");
  for (std::string item; std::getline(items, item, ',');) {
    const std::size_t equals = item.find('=');
    if (equals == std::string::npos) refuse(item);
    const std::string name = item.substr(0, equals), value = item.substr(equals + 1);
    char function[64];
    long long nth;
    int code;
    if (name == "missing")
      miss(value);
    else if (name == "fail" &&
             std::sscanf(value.c_str(), "%63[^:]:%lld:%d", function, &nth, &code) == 3)
      inject(function, nth, code);
    else if (!set(name, std::atoll(value.c_str())))
      refuse(item);
  }
}

std::int64_t Machine::setting(const std::string& name) {
  const Lock lock(mutex_);
  return settings_.at(name);
}

bool Machine::set(const std::string& name, std::int64_t value) {
  const Lock lock(mutex_);
  const auto found = settings_.find(name);
  if (found == settings_.end()) return false;
  found->second = value;
  return true;
}

std::int64_t Machine::count(const std::string& name) {
  const Lock lock(mutex_);
  const auto found = counts_.find(name);
  return found == counts_.end() ? 0 : found->second;
}

void Machine::add(const std::string& name, std::int64_t change) {
  const Lock lock(mutex_);
  counts_[name] += change;
}

void Machine::inject(const std::string& function, std::int64_t nth, CUresult code) {
  const Lock lock(mutex_);
  injections_.push_back({function, nth, code});
}

void Machine::miss(const std::string& function) {
  const Lock lock(mutex_);
  missing_.insert(function);
}

bool Machine::misses(const std::string& function) {
  const Lock lock(mutex_);
  return missing_.count(function);
}

void Machine::release_hung() {
  const Lock lock(mutex_);
  num_released_ = num_hangs_;  // those that haven't got so far, too
  changed_.notify_all();
}

CUresult Machine::init() {
  const Lock lock(mutex_);
  if (pid_) return CUDA_SUCCESS;
  if (settings_.at("num_devices") == 0) return CUDA_ERROR_NO_DEVICE;
  pid_ = getpid();
  streams_[nullptr] = start_stream(true);
  return CUDA_SUCCESS;
}

CUresult Machine::enter(const char* function, bool needs_context) {
  // A forked child has none of the threads, and maybe a mutex that nobody will unlock.
  if (pid_ && pid_ != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
  const Lock lock(mutex_);
  ++counts_[function];
  for (auto injection = injections_.begin(); injection != injections_.end(); ++injection)
    if (injection->function == function && --injection->nth == 0) {
      const CUresult code = injection->code;
      injections_.erase(injection);
      return code;
    }
  if (error_) return error_;
  if (!pid_) return CUDA_ERROR_NOT_INITIALIZED;
  return needs_context && !current_context() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

CUresult Machine::fail(CUresult code, const std::string& why) {
  if (error_) return error_;
  std::fprintf(stderr, "cuda_double: the device fails with error %d: %s\n", code, why.c_str());
  error_ = code;
  for (const auto& [handle, stream] : streams_) stream->given.notify_all();
  changed_.notify_all();
  return code;
}

}  // namespace cuda_double

using cuda_double::machine;

extern "C" {

/// -1 if there is no such setting.
long long cuda_double_setting(const char* name) try {
  return machine().setting(name);
} catch (const std::out_of_range&) {
  return -1;
}
/// 0, or -1 if there is no such setting.
int cuda_double_set(const char* name, long long value) {
  return machine().set(name, value) ? 0 : -1;
}
long long cuda_double_count(const char* name) { return machine().count(name); }
void cuda_double_fail(const char* function, long long nth, int code) {
  machine().inject(function, nth, code);
}
void cuda_double_release_hung() { machine().release_hung(); }
/// As torch's caching allocator takes memory back: without waiting. CUresult.
int cuda_double_free(unsigned long long address) {
  return machine().free(cuda_double::Kind::device, reinterpret_cast<std::byte*>(address), false);
}
/// Where the host may look at device memory although there is a guard; null for other memory.
void* cuda_double_alias(unsigned long long address) {
  return machine().alias(reinterpret_cast<const std::byte*>(address));
}
}
