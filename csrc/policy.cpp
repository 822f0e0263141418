#include "policy.h"

#include <map>
#include <mutex>

#include "error.h"
#include "eviction/adaptive.h"
#include "eviction/arc.h"
#include "eviction/belady.h"
#include "eviction/clock.h"
#include "eviction/fifo.h"
#include "eviction/gdsf.h"
#include "eviction/hint_aware.h"
#include "eviction/least_stale.h"
#include "eviction/lfru.h"
#include "eviction/lfu.h"
#include "eviction/lirs.h"
#include "eviction/lru.h"
#include "eviction/per_layer.h"
#include "eviction/random.h"
#include "eviction/s3_fifo.h"
#include "eviction/sieve.h"
#include "eviction/slru.h"
#include "eviction/two_q.h"
#include "eviction/w_tiny_lfu.h"
#include "replay.h"

namespace tiered_mem {

namespace {

struct BuiltIn {
  PolicyInfo info;
  std::unique_ptr<EvictionPolicy> (*make)();
  Replay replay;
};

template <class Policy>
BuiltIn built_in(const char* name, const char* summary, const char* source) {
  return {{name, summary, source},
          [] { return std::unique_ptr<EvictionPolicy>(std::make_unique<Policy>()); },
          [](const Requests& requests, std::uint64_t budget) {
            Policy policy;
            return replay(policy, requests, budget);
          }};
}

const std::vector<BuiltIn>& built_ins() {
  static const std::vector<BuiltIn> all = {
      built_in<Adaptive>("adaptive",
                         "evicts what is expected last, by uses that fade at learned rates",
                         "Hawkes, 1971; LRFU, Lee et al., 2001"),
      built_in<HintAware>("hint-aware", "adaptive, and believes hints as far as they came true",
                          "after Belady, 1966"),
      built_in<Lru>("lru", "evicts the block unused for longest", "textbook"),
      built_in<Fifo>("fifo", "evicts the block that came first", "textbook"),
      built_in<Clock>("clock", "FIFO with a second chance for what was used",
                      "Corbató, 1968 (Multics)"),
      built_in<Sieve>("sieve", "a hand passes over what was used and moves nothing",
                      "Zhang et al., NSDI 2024"),
      built_in<Arc>("arc", "balances what was used once and again by what it lost of either",
                    "Megiddo and Modha, FAST 2003"),
      built_in<Slru>("slru", "LRU in four segments, a use lifts by one",
                     "Karedla et al., IEEE Computer 1994"),
      built_in<TwoQ>("2q", "a FIFO queue for newcomers, LRU for what comes again",
                     "Johnson and Shasha, VLDB 1994"),
      built_in<Lirs>("lirs", "keeps what has a short time between its last two uses",
                     "Jiang and Zhang, SIGMETRICS 2002"),
      built_in<S3Fifo>("s3-fifo", "a small and a main FIFO queue, and ghosts",
                       "Yang et al., SOSP 2023"),
      built_in<WTinyLfu>("w-tinylfu", "admits by frequency what leaves a small LRU window",
                         "Einziger, Friedman and Manes, 2017 (arXiv:1512.00727)"),
      built_in<Lfu>("lfu", "evicts the block used least often, with dynamic aging",
                    "Arlitt et al., 1999"),
      built_in<Random>("random", "evicts any block, seeded", "textbook"),
      built_in<Lfru>("lfru", "half kept by recency, half by frequency",
                     "Bilal and Kang, 2017 (arXiv:1702.04078)"),
      built_in<Gdsf>("gdsf", "evicts what saves least time a byte, aged", "Cherkasova, 1998"),
      built_in<LeastStale>("least-stale", "evicts what the pass hasn't used, layers in turn",
                           "SpecMD, Hoang et al., 2026 (arXiv:2602.03921)"),
  };
  return all;
}

const std::string kPerLayer = "per-layer(";
const std::string kBelady = "belady";

struct PlugIns {
  std::mutex mutex;
  std::map<std::string, PolicyFactory> by_name;
};
PlugIns& plug_ins() {
  static PlugIns* all = new PlugIns;  // outlives the interpreter that its factories need
  return *all;
}

}  // namespace

thread_local bool PolicyCall::active_ = false;

void register_policy(const std::string& name, PolicyFactory make) {
  for (const PolicyInfo& policy : list_policies())
    if (policy.name == name)
      throw ConfigError("'" + name + "' is a built-in eviction policy; choose another name");
  if (name.empty() || name.find_first_of("() ,") != std::string::npos)
    throw ConfigError("'" + name + "' can't name a policy: no parentheses, commas or spaces");
  PlugIns& all = plug_ins();
  const std::lock_guard lock(all.mutex);
  all.by_name[name] = std::move(make);
}

std::unique_ptr<EvictionPolicy> make_belady(std::vector<Key> future) {
  return std::make_unique<Belady>(std::move(future));
}

std::unique_ptr<EvictionPolicy> make_policy(const std::string& spec) {
  if (spec.rfind(kPerLayer, 0) == 0 && spec.back() == ')') {
    const std::string inner = spec.substr(kPerLayer.size(), spec.size() - kPerLayer.size() - 1);
    make_policy(inner);  // an unknown name is refused now, not at the first insert
    return std::make_unique<PerLayer>([inner] { return make_policy(inner); });
  }
  if (spec == kBelady)
    throw ConfigError("'belady' knows the future: it exists in the simulator only");
  std::string names;
  for (const BuiltIn& policy : built_ins()) {
    if (policy.info.name == spec) return policy.make();
    names += policy.info.name + ", ";
  }
  PolicyFactory make;
  {
    PlugIns& all = plug_ins();
    const std::lock_guard lock(all.mutex);
    const auto found = all.by_name.find(spec);
    if (found != all.by_name.end()) make = found->second;
  }
  if (make) return make();
  throw ConfigError("unknown eviction policy '" + spec + "'; there are: " + names +
                    "and per-layer(X) around any of them");
}

Replay find_replay(const std::string& name) {
  if (name == kBelady)
    return [](const Requests& requests, std::uint64_t budget) {
      Belady policy({requests.keys, requests.keys + requests.count});
      return replay(policy, requests, budget);
    };
  for (const BuiltIn& policy : built_ins())
    if (policy.info.name == name) return policy.replay;
  return nullptr;
}

std::vector<PolicyInfo> list_policies() {
  std::vector<PolicyInfo> all;
  for (const BuiltIn& policy : built_ins()) all.push_back(policy.info);
  all.push_back({"per-layer(X)", "policy X for each layer, layers in equal shares",
                 "Eliseev and Mazur, 2023 (arXiv:2312.17238)"});
  all.push_back({kBelady, "evicts the block used again last; simulator only",
                 "Belady, IBM Systems Journal 1966"});
  return all;
}

}  // namespace tiered_mem
