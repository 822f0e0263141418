// The eviction interface. Policies choose, the runtime acts: a policy ranks blocks; it never
// moves, allocates or blocks. Built-in policies lie in policies/eviction, one a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "key.h"

namespace tiered_mem {

/// How a block enters: because an event needs it, or on a guess (a hint, or the copy that stays
/// behind in DRAM). A guess may be ranked lowest until it is used.
enum class Entry { demanded, guessed };

/// Says whether a block may be evicted now. Pinned and in-flight blocks may not.
using Evictable = std::function<bool(Key)>;

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  /// `key` became resident. It wasn't before.
  virtual void insert(Key key, std::uint64_t nbytes, Entry entry) = 0;
  /// An event used `key`, which is resident.
  virtual void touch(Key key) = 0;
  /// `key` left for another reason than `evict`.
  virtual void erase(Key key) = 0;
  /// Chooses the victim among the blocks that `evictable` admits, forgets it and returns it;
  /// nothing if there is none.
  virtual std::optional<Key> evict(const Evictable& evictable) = 0;
  /// The number of resident blocks it knows.
  virtual std::size_t size() const = 0;
};

struct PolicyInfo {
  std::string name;
  std::string summary;
  std::string source;
};

/// The policy that `spec` names: "lru", "fifo", or "per-layer(X)" around any of them. Throws
/// ConfigError, with the names there are, if there is none of this name.
std::unique_ptr<EvictionPolicy> make_policy(const std::string& spec);

/// All policies that `make_policy` knows.
std::vector<PolicyInfo> list_policies();

}  // namespace tiered_mem
