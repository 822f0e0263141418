#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "policy.h"

namespace tiered_mem {

/// A partition of any policy: every layer keeps its own ranking, and the victim comes from the
/// layer that holds the most bytes. Layers so converge to equal shares, and one layer's burst
/// can't empty another's (which is what a global LRU does in every token cycle).
/// Source: per-layer LFU/LRU caches in Mixtral-offloading (Eliseev and Mazur, 2023).
class PerLayer final : public EvictionPolicy {
 public:
  using Factory = std::function<std::unique_ptr<EvictionPolicy>()>;
  explicit PerLayer(Factory make) : make_(std::move(make)) {}

  void insert(Key key, std::uint64_t nbytes, Entry entry) override {
    Layer& layer = layers_[partition_of(key)];
    if (!layer.policy) layer.policy = make_();
    layer.policy->insert(key, nbytes, entry);
    layer.block_nbytes = nbytes;
  }
  void touch(Key key) override { layers_[partition_of(key)].policy->touch(key); }
  void erase(Key key) override {
    if (Layer& layer = layers_[partition_of(key)]; layer.policy) layer.policy->erase(key);
  }

  std::optional<Key> evict(const Evictable& evictable) override {
    std::vector<Layer*> order;
    for (auto& [partition, layer] : layers_)
      if (layer.policy) order.push_back(&layer);
    std::stable_sort(order.begin(), order.end(),
                     [](const Layer* a, const Layer* b) { return a->nbytes() > b->nbytes(); });
    for (Layer* layer : order)
      if (auto key = layer->policy->evict(evictable)) return key;
    return std::nullopt;
  }

  std::size_t size() const override {
    std::size_t total = 0;
    for (const auto& [partition, layer] : layers_)
      if (layer.policy) total += layer.policy->size();
    return total;
  }

 private:
  struct Layer {
    std::unique_ptr<EvictionPolicy> policy;
    std::uint64_t block_nbytes = 0;  // blocks of one layer are of one size
    std::uint64_t nbytes() const { return policy->size() * block_nbytes; }
  };
  Factory make_;
  std::map<Partition, Layer> layers_;
};

}  // namespace tiered_mem
