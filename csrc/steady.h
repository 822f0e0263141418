// The clock that real time is measured by.
#pragma once

#include <chrono>

namespace tiered_mem {

inline double seconds_now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace tiered_mem
