#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "policy.h"

namespace tiered_mem {

/// A partition of any policy: every layer keeps its own ranking, and the victim comes from the
/// layer that holds the most bytes. Layers so converge to equal shares, and one layer's burst
/// can't empty another's (which is what a global LRU does in every token cycle).
/// Source: per-layer LFU/LRU caches in Mixtral-offloading (Eliseev and Mazur, 2023).
class PerLayer final : public EvictionPolicy {
 public:
  explicit PerLayer(PolicyFactory make) : make_(std::move(make)) {}

  void set_budget(std::uint64_t nbytes) override {
    budget_ = nbytes;
    for (auto& [partition, layer] : layers_) layer.policy->set_budget(budget_ / layers_.size());
  }
  void begin_event(Partition partition) override {
    layer_of(partition).policy->begin_event(partition);
  }
  void insert(Key key, std::uint64_t nbytes) override {
    Layer& layer = layer_of(partition_of(key));
    layer.policy->insert(key, nbytes);
    layer.block_nbytes = nbytes;
  }
  bool touch(Key key) override {
    Layer* layer = find(key);
    return layer != nullptr && layer->policy->touch(key);
  }
  void erase(Key key) override {
    if (Layer* layer = find(key)) layer->policy->erase(key);
  }

  std::optional<Key> evict(const Evictable& evictable, Key incoming) override {
    // The layer that a block comes to counts as if it were there, or else shares would drift.
    order_.clear();
    for (auto& [partition, layer] : layers_) {
      const bool grows = incoming != kNoKey && partition == partition_of(incoming);
      order_.push_back({(layer.policy->size() + grows) * layer.block_nbytes, &layer});
    }
    const auto smaller = [](const auto& a, const auto& b) { return a.first < b.first; };
    while (!order_.empty()) {
      const auto largest = std::max_element(order_.begin(), order_.end(), smaller);
      if (auto key = largest->second->policy->evict(evictable, incoming)) return key;
      order_.erase(largest);
    }
    return std::nullopt;
  }

  std::size_t size() const override {
    std::size_t total = 0;
    for (const auto& [partition, layer] : layers_) total += layer.policy->size();
    return total;
  }
  void hint(Key key, double probability) override {
    layer_of(partition_of(key)).policy->hint(key, probability);
  }
  void rethrow() override {
    for (auto& [partition, layer] : layers_) layer.policy->rethrow();
  }

 private:
  struct Layer {
    std::unique_ptr<EvictionPolicy> policy;
    std::uint64_t block_nbytes = 0;  // blocks of one layer are of one size
  };

  Layer* find(Key key) {
    const auto found = layers_.find(partition_of(key));
    return found == layers_.end() ? nullptr : &found->second;
  }
  Layer& layer_of(Partition partition) {
    const auto found = layers_.find(partition);
    if (found != layers_.end()) return found->second;
    auto policy = make_();  // a plug-in may throw: then there is no such layer
    Layer& layer = layers_[partition];
    layer.policy = std::move(policy);
    set_budget(budget_);
    return layer;
  }

  PolicyFactory make_;
  std::uint64_t budget_ = 0;
  std::map<Partition, Layer> layers_;
  std::vector<std::pair<std::uint64_t, Layer*>> order_;
};

}  // namespace tiered_mem
