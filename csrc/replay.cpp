#include "replay.h"

namespace tiered_mem {

Misses count_misses(const std::string& spec, const Requests& requests, std::uint64_t budget) {
  if (budget == 0) throw ConfigError("replay: a budget of at least 1, please");
  if (std::find(requests.keys, requests.keys + requests.count, kNoKey) !=
      requests.keys + requests.count)
    throw ConfigError("replay: key 2^64 - 1 names no block");
  if (requests.nbytes != nullptr && std::find(requests.nbytes, requests.nbytes + requests.count,
                                              0) != requests.nbytes + requests.count)
    throw ConfigError("replay: a block has bytes");
  if (const Replay replay_built_in = find_replay(spec)) return replay_built_in(requests, budget);
  return replay(*make_policy(spec), requests, budget);
}

}  // namespace tiered_mem
