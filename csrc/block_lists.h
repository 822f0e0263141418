// Several lists of blocks over one index: what policies with segments and ghosts are made of.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "flat_map.h"
#include "policy.h"

namespace tiered_mem {

/// A block is in one of the lists, each from oldest to newest. Nodes lie in one vector, are linked
/// by 32-bit numbers and reused. `Note` is what a policy notes of every block.
template <std::uint32_t num_lists, class Note>
class BlockLists {
 public:
  /// Numbers a node. Those below num_lists stand for the ends of the lists; 0 is no block's.
  using Id = std::uint32_t;
  struct Node {
    Key key;
    std::uint64_t nbytes;
    Id newer, older;
    std::uint32_t list;
    Note note;
  };

  BlockLists() {
    for (std::uint32_t list = 0; list < num_lists; ++list)
      nodes_.push_back({kNoKey, 0, list, list, list, Note{}});
  }

  /// 0 if the block is in no list.
  Id find(Key key) const {
    const Id* id = index_.find(key);
    return id == nullptr ? 0 : *id;
  }
  /// Fetches what `find` will look at into the CPU's caches.
  void prefetch(Key key) const { index_.prefetch(key); }
  Node& operator[](Id id) { return nodes_[id]; }
  const Node& operator[](Id id) const { return nodes_[id]; }

  std::uint64_t nbytes(std::uint32_t list) const { return totals_[list].nbytes; }
  std::size_t size(std::uint32_t list) const { return totals_[list].num_blocks; }

  /// Walk with `for (Id id = oldest(list); id != list; id = (*this)[id].newer)`.
  Id oldest(std::uint32_t list) const { return nodes_[list].newer; }
  /// The oldest that `evictable` admits, or 0.
  Id oldest(std::uint32_t list, const Evictable& evictable) const {
    for (Id id = oldest(list); id != list; id = nodes_[id].newer)
      if (evictable(nodes_[id].key)) return id;
    return 0;
  }

  /// Adds a block that is in no list, as the list's newest.
  Id add(std::uint32_t list, Key key, std::uint64_t nbytes) {
    Id id = spare_;
    if (id != 0) {
      spare_ = nodes_[id].newer;
    } else {
      id = static_cast<Id>(nodes_.size());
      nodes_.emplace_back();
    }
    nodes_[id] = {key, nbytes, 0, 0, list, Note{}};
    link(id, list);
    index_.put(key, id);
    return id;
  }
  /// Makes the block the newest of `list`.
  void move(Id id, std::uint32_t list) {
    unlink(id);
    link(id, list);
  }
  /// The same for a block that comes again, perhaps with another size.
  void move(Id id, std::uint32_t list, std::uint64_t nbytes) {
    unlink(id);
    nodes_[id].nbytes = nbytes;
    link(id, list);
  }
  /// Its key.
  Key remove(Id id) {
    const Key key = nodes_[id].key;
    unlink(id);
    index_.erase(key);
    nodes_[id].newer = spare_;
    spare_ = id;
    return key;
  }

 private:
  struct Total {
    std::uint64_t nbytes = 0;
    std::size_t num_blocks = 0;
  };

  void link(Id id, std::uint32_t list) {
    Node& node = nodes_[id];
    node.list = list;
    node.newer = list;
    node.older = nodes_[list].older;
    nodes_[node.older].newer = id;
    nodes_[list].older = id;
    totals_[list].nbytes += node.nbytes;
    ++totals_[list].num_blocks;
  }
  void unlink(Id id) {
    const Node& node = nodes_[id];
    nodes_[node.newer].older = node.older;
    nodes_[node.older].newer = node.newer;
    totals_[node.list].nbytes -= node.nbytes;
    --totals_[node.list].num_blocks;
  }

  std::vector<Node> nodes_;
  Id spare_ = 0;  // first of the free nodes, linked by `newer`
  std::array<Total, num_lists> totals_;
  FlatMap<Id> index_;
};

}  // namespace tiered_mem
