// The eviction interface. Policies choose, the runtime acts: a policy ranks blocks; it never
// moves, allocates or blocks. Built-in policies lie in policies/eviction, one a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "key.h"

namespace tiered_mem {

/// Says whether a block may be evicted now. Pinned and in-flight blocks may not. Refers to a
/// callable that outlives it; made from nothing, it admits every block at no cost.
class Evictable {
 public:
  Evictable() = default;
  template <class Predicate>
  Evictable(const Predicate& predicate)
      : predicate_(&predicate), call_([](const void* object, Key key) -> bool {
          return (*static_cast<const Predicate*>(object))(key);
        }) {}
  bool operator()(Key key) const { return call_ == nullptr || call_(predicate_, key); }

 private:
  const void* predicate_ = nullptr;
  bool (*call_)(const void*, Key) = nullptr;
};

/// Sizes are bytes; a count of slots is the case in which every block has one byte.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  /// The bytes that its blocks may hold together. Said before the first insert, and at a resize;
  /// blocks that are too many then are taken by `evict`.
  virtual void set_budget(std::uint64_t) {}
  /// An event on `partition` begins: its touches, evictions and inserts follow, all its waves'
  /// included. Those of other threads' events may come between.
  virtual void begin_event(Partition) {}
  /// `key` became resident. It wasn't before.
  virtual void insert(Key key, std::uint64_t nbytes) = 0;
  /// An event used `key`. False, and nothing has changed, if it isn't resident.
  virtual bool touch(Key key) = 0;
  /// `key` left for another reason than `evict`. Does nothing if it isn't resident.
  virtual void erase(Key key) = 0;
  /// Chooses the victim among the blocks that `evictable` admits, forgets it and returns it;
  /// nothing if there is none. `incoming` is inserted next; kNoKey if nothing comes for it.
  virtual std::optional<Key> evict(const Evictable& evictable, Key incoming) = 0;
  /// The number of resident blocks it knows.
  virtual std::size_t size() const = 0;

  /// The next event of the key's partition uses it with this probability; 0 takes that back. The
  /// key may be resident or not.
  virtual void hint(Key, double /*probability*/) {}
  /// Throws what a plug-in raised in a call that could not fail, once.
  virtual void rethrow() {}
};

/// Marks that this thread is inside a plug-in, which may not call the runtime that asks it.
class PolicyCall {
 public:
  PolicyCall() : outer_(std::exchange(active_, true)) {}
  ~PolicyCall() { active_ = outer_; }
  PolicyCall(const PolicyCall&) = delete;
  PolicyCall& operator=(const PolicyCall&) = delete;
  static bool active() { return active_; }

 private:
  static thread_local bool active_;
  bool outer_;
};

struct PolicyInfo {
  std::string name;
  std::string summary;
  std::string source;
};

using PolicyFactory = std::function<std::unique_ptr<EvictionPolicy>()>;

/// The policy that `spec` names: "lru", or "per-layer(X)" around any X. Throws ConfigError, with
/// the names there are, if there is none of this name.
std::unique_ptr<EvictionPolicy> make_policy(const std::string& spec);

/// Belady's MIN for a tier whose every use to come is known, in order. Throws ConfigError.
std::unique_ptr<EvictionPolicy> make_belady(std::vector<Key> future);

/// Makes a plug-in known by a name; a built-in's name is refused. Throws ConfigError.
void register_policy(const std::string& name, PolicyFactory make);

/// All built-in policies.
std::vector<PolicyInfo> list_policies();

}  // namespace tiered_mem
