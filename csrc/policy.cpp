#include "policy.h"

#include "error.h"
#include "eviction/fifo.h"
#include "eviction/lru.h"
#include "eviction/per_layer.h"

namespace tiered_mem {

namespace {

struct BuiltIn {
  PolicyInfo info;
  std::unique_ptr<EvictionPolicy> (*make)();
};

const std::vector<BuiltIn>& built_ins() {
  static const std::vector<BuiltIn> all = {
      {{"lru", "evicts the block unused for longest", "textbook"},
       [] { return std::unique_ptr<EvictionPolicy>(new Lru); }},
      {{"fifo", "evicts the block that came first", "textbook"},
       [] { return std::unique_ptr<EvictionPolicy>(new Fifo); }},
  };
  return all;
}

const std::string kPerLayer = "per-layer(";

}  // namespace

std::unique_ptr<EvictionPolicy> make_policy(const std::string& spec) {
  if (spec.rfind(kPerLayer, 0) == 0 && spec.back() == ')') {
    const std::string inner = spec.substr(kPerLayer.size(), spec.size() - kPerLayer.size() - 1);
    make_policy(inner);  // an unknown name is refused now, not at the first insert
    return std::make_unique<PerLayer>([inner] { return make_policy(inner); });
  }
  std::string names;
  for (const BuiltIn& policy : built_ins()) {
    if (policy.info.name == spec) return policy.make();
    names += policy.info.name + ", ";
  }
  throw ConfigError("unknown eviction policy '" + spec + "'; there are: " + names +
                    "and per-layer(X) around any of them");
}

std::vector<PolicyInfo> list_policies() {
  std::vector<PolicyInfo> all;
  for (const BuiltIn& policy : built_ins()) all.push_back(policy.info);
  all.push_back({"per-layer(X)", "policy X for each layer, layers in equal shares",
                 "Eliseev and Mazur, 2023 (arXiv:2312.17238)"});
  return all;
}

}  // namespace tiered_mem
