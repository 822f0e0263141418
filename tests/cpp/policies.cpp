// What every eviction policy must keep to, by random calls beside a map of what is resident.
//
//   policies SPEC...
#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "policy.h"

using namespace tiered_mem;

namespace {
std::size_t live_nbytes = 0;
}  // namespace

void* operator new(std::size_t nbytes) {
  void* memory = std::malloc(nbytes);
  if (memory == nullptr) throw std::bad_alloc();
  live_nbytes += malloc_usable_size(memory);
  return memory;
}
void operator delete(void* memory) noexcept {
  live_nbytes -= malloc_usable_size(memory);
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

Key key_of(unsigned layer, unsigned index) { return Key{1} << 56 | Key(layer) << 32 | Key(index); }

class Driver {
 public:
  Driver(const std::string& spec, std::uint64_t budget, bool mixed, unsigned seed)
      : policy_(make_policy(spec)), budget_(budget), mixed_(mixed), random_(seed) {
    policy_->set_budget(budget_);
  }

  void run(unsigned num_calls) {
    for (unsigned i = 0; i < num_calls; ++i) {
      step();
      require(policy_->size() == resident_.size(), "size() isn't the number of resident blocks");
    }
    pinned_.clear();
    while (!resident_.empty()) require(evict(kNoKey), "a block was lost");
    require(!evict(kNoKey), "a victim of an empty cache");
  }

  std::vector<Key> victims;

 private:
  unsigned draw(unsigned below) { return random_() % below; }
  // Small indices come often.
  Key draw_key() {
    const unsigned range = 1u << draw(8);
    return key_of(draw(3), draw(range));
  }
  std::uint64_t nbytes_of(Key key) const { return mixed_ ? 1 + key % 5 * 3 : 1; }
  bool evictable(Key key) const { return resident_.count(key) && !pinned_.count(key); }

  void step() {
    const unsigned what = draw(100);
    if (what < 80) return request(draw_key());
    if (what < 86) return erase(draw_key());
    if (what < 90) return pin(draw_key());
    if (what < 94) return pinned_.clear();
    if (what < 97) return policy_->hint(draw_key(), draw(5) / 4.0);
    if (what < 98) reserved_ = draw(budget_);  // guesses and other size classes take room
    if (what < 99 && budget_ > 2) policy_->set_budget(budget_ = budget_ * (1 + draw(4)) / 2);
    budget_ = std::min<std::uint64_t>(budget_, 500);
    policy_->set_budget(budget_);
    while (used_ > budget_ && evict(kNoKey)) {
    }
  }
  void request(Key key) {
    policy_->begin_event(partition_of(key));
    const bool hit = policy_->touch(key);
    require(hit == (resident_.count(key) == 1), "touch() doesn't say whether it is resident");
    if (hit) return;
    const std::uint64_t nbytes = nbytes_of(key);
    while (used_ + nbytes + reserved_ > budget_ && !resident_.empty())
      if (!evict(key)) return;
    policy_->insert(key, nbytes);
    resident_[key] = nbytes;
    used_ += nbytes;
  }
  bool evict(Key incoming) {
    const auto admits = [this](Key key) { return evictable(key); };
    const auto key = policy_->evict(admits, incoming);
    if (!key) {
      for (const auto& [resident, nbytes] : resident_)
        require(!evictable(resident), "no victim though a block may go");
      return false;
    }
    require(resident_.count(*key) == 1, "the victim isn't resident");
    require(evictable(*key), "the victim is pinned");
    victims.push_back(*key);
    forget(*key);
    return true;
  }
  void erase(Key key) {
    if (pinned_.count(key)) return;
    policy_->erase(key);
    if (resident_.count(key)) forget(key);
  }
  void forget(Key key) {
    used_ -= resident_.at(key);
    resident_.erase(key);
  }
  void pin(Key key) {
    if (resident_.count(key)) pinned_.insert(key);
  }

  std::unique_ptr<EvictionPolicy> policy_;
  std::map<Key, std::uint64_t> resident_;
  std::set<Key> pinned_;
  std::uint64_t budget_, used_ = 0, reserved_ = 0;
  bool mixed_;
  std::mt19937 random_;
};

void check_calls(const std::string& spec) {
  for (const bool mixed : {false, true})
    for (const std::uint64_t num_slots : {1, 2, 3, 8, 64})
      for (unsigned seed = 0; seed < 3; ++seed) {
        const std::uint64_t budget = num_slots * (mixed ? 7 : 1);
        Driver driver(spec, budget, mixed, seed), again(spec, budget, mixed, seed);
        driver.run(2000);
        again.run(2000);
        require(driver.victims == again.victims, "the same calls gave other victims");
      }
}

// Every request is new: whatever is remembered of those that left must be bounded.
void check_memory(const std::string& spec) {
  const auto policy = make_policy(spec);
  constexpr std::size_t kNumSlots = 64;
  policy->set_budget(kNumSlots);
  std::size_t settled = 0;
  for (unsigned i = 0; i < 160000; ++i) {
    const Key key = key_of(i % 3, i);
    require(!policy->touch(key), "a hit on a block that never came");
    if (policy->size() == kNumSlots) require(policy->evict({}, key).has_value(), "no victim");
    policy->insert(key, 1);
    if (i == 120000) settled = live_nbytes;
  }
  require(live_nbytes <= settled + settled / 4, "memory grows with the number of requests");
}

}  // namespace

int main(int argc, char** argv) {
  int failures = 0;
  for (int i = 1; i < argc; ++i) {
    try {
      check_calls(argv[i]);
      check_memory(argv[i]);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", argv[i], error.what());
      ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}
