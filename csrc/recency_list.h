// A doubly linked list of keys with O(1) lookup: what LRU, FIFO and their kin are made of.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "flat_map.h"
#include "policy.h"

namespace tiered_mem {

/// Keys from newest (front) to oldest (back). Nodes live in one vector and are reused.
class RecencyList {
 public:
  RecencyList() : nodes_{{0, 0, 0}} {}

  void push_front(Key key) { index_.put(key, link(key, nodes_[0].next)); }
  void push_back(Key key) { index_.put(key, link(key, 0)); }
  /// False if it isn't there.
  bool move_to_front(Key key) {
    const std::uint32_t* node = index_.find(key);
    if (node == nullptr) return false;
    unlink(*node);
    relink(*node, nodes_[0].next);
    return true;
  }
  bool contains(Key key) const { return index_.find(key) != nullptr; }
  std::size_t size() const { return index_.size(); }

  /// False if it wasn't there.
  bool erase(Key key) {
    const std::uint32_t* node = index_.find(key);
    if (node == nullptr) return false;
    unlink(*node);
    spare_.push_back(*node);
    index_.erase(key);
    return true;
  }

  /// Removes and returns the oldest key that `evictable` admits.
  std::optional<Key> pop_back(const Evictable& evictable) {
    for (std::uint32_t node = nodes_[0].prev; node != 0; node = nodes_[node].prev) {
      const Key key = nodes_[node].key;
      if (!evictable(key)) continue;
      erase(key);
      return key;
    }
    return std::nullopt;
  }

 private:
  struct Node {
    Key key;
    std::uint32_t prev, next;
  };

  // Node 0 is the sentinel: its `next` is the front, its `prev` the back.
  std::uint32_t link(Key key, std::uint32_t before) {
    std::uint32_t node;
    if (spare_.empty()) {
      node = static_cast<std::uint32_t>(nodes_.size());
      nodes_.push_back({key, 0, 0});
    } else {
      node = spare_.back();
      spare_.pop_back();
      nodes_[node].key = key;
    }
    relink(node, before);
    return node;
  }
  void relink(std::uint32_t node, std::uint32_t before) {
    nodes_[node].next = before;
    nodes_[node].prev = nodes_[before].prev;
    nodes_[nodes_[before].prev].next = node;
    nodes_[before].prev = node;
  }
  void unlink(std::uint32_t node) {
    nodes_[nodes_[node].prev].next = nodes_[node].next;
    nodes_[nodes_[node].next].prev = nodes_[node].prev;
  }

  std::vector<Node> nodes_;
  std::vector<std::uint32_t> spare_;
  FlatMap<std::uint32_t> index_;
};

}  // namespace tiered_mem
