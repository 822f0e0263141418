// The project's own kernels, run on the host, and what they touch.
#include <cstring>
#include <map>

#include "machine.h"
#if __has_include("kernels.cu")
#include "kernels.cu"

namespace cuda_double {

namespace {

/// The n-th of a kernel's parameters.
template <typename T>
T parameter(void** parameters, int n) {
  T value;
  std::memcpy(&value, parameters[n], sizeof value);
  return value;
}

using Accesses = std::vector<Access>;

void touch(Accesses& accesses, const void* data, std::uint64_t nbytes, bool writes) {
  if (nbytes) accesses.push_back({static_cast<const std::byte*>(data), nbytes, writes});
}

std::function<Accesses()> copy_blocks(void** parameters) {
  const auto* const blocks = parameter<const CopyBlock*>(parameters, 0);
  const auto num_blocks = parameter<unsigned>(parameters, 1);
  return [=] {
    Accesses accesses;
    touch(accesses, blocks, num_blocks * sizeof(CopyBlock), false);
    for (unsigned n = 0; n < num_blocks; ++n) {
      touch(accesses, reinterpret_cast<void*>(blocks[n].target), blocks[n].nbytes, true);
      touch(accesses, reinterpret_cast<void*>(blocks[n].source), blocks[n].nbytes, false);
    }
    return accesses;
  };
}

/// Of both ways: which of the first two parameters is the table, and which is written.
std::function<Accesses()> rows(void** parameters, int table_at) {
  const auto* const table = parameter<const char*>(parameters, table_at);
  const auto* const rows = parameter<const char*>(parameters, 1 - table_at);
  const auto* const ids = parameter<const i64*>(parameters, 2);
  const auto num_rows = parameter<unsigned>(parameters, 3);
  const auto row_nbytes = parameter<unsigned>(parameters, 4);
  const auto stride = parameter<u64>(parameters, 5);
  return [=] {
    Accesses accesses;
    touch(accesses, ids, num_rows * sizeof(i64), false);
    for (unsigned n = 0; n < num_rows; ++n) {
      if (ids[n] < 0) continue;
      touch(accesses, rows + std::uint64_t(n) * row_nbytes, row_nbytes, table_at == 1);
      touch(accesses, table + static_cast<u64>(ids[n]) * stride, row_nbytes, table_at == 0);
    }
    return accesses;
  };
}
std::function<Accesses()> gather_rows(void** parameters) { return rows(parameters, 1); }
std::function<Accesses()> scatter_rows(void** parameters) { return rows(parameters, 0); }

std::function<Accesses()> remap_ids(void** parameters) {
  const auto num_rows = std::uint64_t(parameter<unsigned>(parameters, 1));
  const auto num_experts = std::uint64_t(parameter<unsigned>(parameters, 3));
  const auto num_slots = std::uint64_t(parameter<unsigned>(parameters, 5));
  Accesses accesses;
  const auto add = [&](int n, std::uint64_t nbytes, bool writes) {
    touch(accesses, parameter<const void*>(parameters, n), nbytes, writes);
  };
  add(0, num_rows * sizeof(i64), false);
  add(2, num_experts * sizeof(int), false);
  for (const int n : {7, 8, 9}) add(n, num_rows * sizeof(i64), true);
  add(10, num_rows * sizeof(int), true);
  add(11, num_slots * sizeof(int), true);
  return [=] { return accesses; };
}

const std::map<std::string, std::function<Accesses()> (*)(void**)> kKernels{
    {"tiered_mem_copy_blocks", copy_blocks},
    {"tiered_mem_gather_rows", gather_rows},
    {"tiered_mem_scatter_rows", scatter_rows},
    {"tiered_mem_remap_ids", remap_ids},
};

}  // namespace

bool has_kernel(const std::string& name) { return kKernels.count(name); }

Launch bind_launch(const std::string& name, unsigned grid, unsigned block, void** parameters) {
  return {kKernels.at(name)(parameters),
          tiered_mem_bind_kernel(name.c_str(), grid, block, parameters)};
}

}  // namespace cuda_double

#else
namespace cuda_double {
bool has_kernel(const std::string&) { return false; }
Launch bind_launch(const std::string&, unsigned, unsigned, void**) { return {}; }
}  // namespace cuda_double
#endif
