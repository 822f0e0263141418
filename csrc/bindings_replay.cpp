// Miss counts of policies on flat requests.
#include <utility>

#include "bindings.h"
#include "error.h"
#include "replay.h"

namespace tiered_mem {

namespace {

using NbytesArray = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

Misses count(const std::string& spec, const Requests& requests, std::uint64_t budget) {
  const NoGil release;
  return count_misses(spec, requests, budget);
}

std::uint64_t count_slots(const std::string& spec, const KeyArray& keys, std::uint64_t num_slots) {
  return count(spec, {keys.data(), nullptr, static_cast<std::size_t>(keys.size())}, num_slots)
      .requests;
}

std::pair<std::uint64_t, std::uint64_t> count_nbytes(const std::string& spec, const KeyArray& keys,
                                                     std::uint64_t budget,
                                                     const NbytesArray& nbytes) {
  if (keys.size() != nbytes.size())
    throw ConfigError("count_misses: as many sizes as keys, please");
  const Misses misses =
      count(spec, {keys.data(), nbytes.data(), static_cast<std::size_t>(keys.size())}, budget);
  return {misses.requests, misses.nbytes};
}

}  // namespace

void bind_replay(py::module_& m) {
  m.def("count_misses", &count_slots, py::arg("eviction"), py::arg("keys"), py::arg("num_slots"),
        "Requests that miss in a cache of so many equal slots.");
  m.def("count_misses", &count_nbytes, py::arg("eviction"), py::arg("keys"), py::arg("budget"),
        py::arg("nbytes"), "(requests, bytes) that miss in a cache of so many bytes.");
}

}  // namespace tiered_mem
