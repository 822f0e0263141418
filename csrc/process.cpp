#include "process.h"

#include <pthread.h>

#include <atomic>

namespace tiered_mem {

namespace {

std::atomic<unsigned> generation{0};

const int registered = pthread_atfork(nullptr, nullptr, [] { ++generation; });

}  // namespace

unsigned process_generation() {
  static_cast<void>(registered);
  return generation.load(std::memory_order_relaxed);
}

}  // namespace tiered_mem
