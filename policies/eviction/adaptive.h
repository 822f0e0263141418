#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <vector>

#include "flat_map.h"
#include "policy.h"
#include "recency_list.h"

namespace tiered_mem {

/// Evicts the block whose next use is expected last: the default.
///
/// How likely the next event of its layer uses a block is estimated from its past uses, each of
/// which counts less the longer ago it is. Seven half-lives from one event to for ever (so from
/// LRU to LFU, as in LRFU: Lee et al., IEEE ToC 2001), and the chance that all blocks of the layer
/// share, are mixed: a Hawkes process with exponential kernels (Hawkes, Biometrika 1971). Every use
/// moves the weights to the half-lives that expected it (online expectation maximisation), so
/// there is nothing to tune, and a change of behaviour is followed. Time is counted in events of
/// the block's own layer, and blocks that left are remembered for a while.
///
/// A block with probability p is expected in 1/p rounds of its layer, less what has passed of the
/// present one: of equal blocks those whose layer comes last go first, which is why the budget may
/// be less than a token's cycle through the layers.
///
/// Costs O(layers + blocks of a layer) an eviction; of a layer with more than kSample blocks so
/// many are drawn (seeded), as in LHD (Beckmann et al., NSDI 2018).
class Adaptive : public EvictionPolicy {
 public:
  static constexpr std::size_t kSample = 128;

  void begin_event(Partition partition) override {
    Layer& layer = layer_of(partition);
    ++now_;
    if (layer.num_events > 0) layer.interval = static_cast<double>(now_ - layer.last_event);
    layer.last_event = now_;
    ++layer.num_events;
    for (std::size_t i = 0; i < kNumKernels; ++i)
      layer.norms[i] = layer.norms[i] * kernels().step[i] + 1;
    layer.last = kNone;
  }
  void insert(Key key, std::uint64_t) override {
    Layer& layer = layer_of(partition_of(key));
    const std::uint32_t id = use(key, layer);
    away_.erase(key);
    records_[id].place = static_cast<std::uint32_t>(layer.residents.size());
    layer.residents.push_back(id);
    ++size_;
    forget_old();
  }
  bool touch(Key key) override {
    const std::uint32_t* id = ids_.find(key);
    if (id == nullptr || records_[*id].place == kNone) return false;
    use(key, layer_of(partition_of(key)));
    return true;
  }
  void erase(Key key) override {
    const std::uint32_t* id = ids_.find(key);
    if (id != nullptr && records_[*id].place != kNone) remove(*id);
  }
  std::optional<Key> evict(const Evictable& evictable, Key incoming) override {
    double latest = -1;
    std::uint32_t victim = kNone;
    for (auto& [partition, layer] : layers_) {
      if (layer.residents.empty()) continue;
      const std::uint32_t id = last_expected(layer, evictable);
      if (id == kNone) continue;
      double expected = wait(records_[id], layer) + turn(layer);
      if (incoming != kNoKey && partition != partition_of(incoming)) expected *= kOtherLayer;
      if (expected <= latest) continue;
      latest = expected;
      victim = id;
    }
    if (victim == kNone) return std::nullopt;
    remove(victim);
    return records_[victim].key;
  }
  std::size_t size() const override { return size_; }

 protected:
  static constexpr std::size_t kNumKernels = 7;
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};
  using Row = std::array<double, kNumKernels>;

  /// What is known of a block, resident or not.
  struct Record {
    Key key = 0;
    std::array<float, kNumKernels> counts{};  // decayed uses at the last one, by kernel
    std::uint32_t last_use = 0;               // in events of the layer
    std::uint32_t place = kNone;              // among the residents
  };
  /// How much each kernel explains, of blocks of one kind; the last is the chance all share.
  struct Weights {
    std::array<double, kNumKernels + 1> share;
    double num_learned = 0;
    Weights() { share.fill(1.0 / (kNumKernels + 1)); }
  };
  struct Layer {
    Weights* weights = nullptr;
    std::uint32_t num_events = 0;
    std::uint64_t last_event = 0, num_uses = 0, num_known = 0;
    double interval = 1;                   // events of all layers between two of its own
    Row norms{};                           // what counts would be with a use at each event
    std::vector<std::uint32_t> residents;  // records
    std::uint32_t last = kNone;            // the resident expected last, if known
  };

  /// That the next event of the layer uses the block.
  double probability(const Record& record, const Layer& layer) const {
    const Row faded = fade(layer.num_events - record.last_use);
    const auto& share = layer.weights->share;
    double sum = share[kNumKernels] * common(layer);
    for (std::size_t i = 0; i < kNumKernels; ++i)
      sum += share[i] * record.counts[i] * faded[i] / layer.norms[i];
    return std::clamp(sum, 1e-12, 1.0);
  }
  /// The chance that any known block of the layer has, whatever it did.
  static double common(const Layer& layer) {
    return static_cast<double>(layer.num_uses) / layer.num_events / layer.num_known;
  }
  /// In how many rounds of the layer the block is expected.
  virtual double wait(const Record& record, const Layer& layer) const {
    return 1 / probability(record, layer);
  }
  /// Null if nothing is known of the block.
  const Record* find(Key key) const {
    const std::uint32_t* id = ids_.find(key);
    return id == nullptr ? nullptr : &records_[*id];
  }
  Layer& layer_of(Partition partition) {
    Layer& layer = layers_[partition];
    if (layer.weights == nullptr) layer.weights = &weights_[partition >> 16];
    return layer;
  }

 private:
  struct Kernels {
    Row step;  // of one event
    Kernels() {
      for (std::size_t i = 0; i + 1 < kNumKernels; ++i)
        step[i] = std::exp2(-1 / std::exp2(3.0 * i));  // half-lives 1, 8, 64, ...
      step[kNumKernels - 1] = 1;                       // ... and for ever
    }
  };
  static const Kernels& kernels() {
    static const Kernels all;
    return all;
  }
  /// What is left of a use after so many events.
  static Row fade(std::uint32_t num_events) {
    Row left;
    left[kNumKernels - 1] = 1;
    double power = std::exp2(-std::exp2(-3.0 * (kNumKernels - 2)) * num_events);
    for (std::size_t i = kNumKernels - 1; i-- > 0;) {
      left[i] = power;
      for (int squared = 0; squared < 3; ++squared) power *= power;
    }
    return left;
  }
  /// The part of a round until the layer's next event.
  double turn(const Layer& layer) const {
    const double waited = static_cast<double>(now_ - layer.last_event);
    return std::max(0.0, 1 - waited / layer.interval);
  }

  std::uint32_t use(Key key, Layer& layer) {
    if (layer.num_events == 0) begin_event(partition_of(key));  // a tier that has no events
    ++layer.num_uses;
    layer.last = kNone;
    const std::uint32_t* found = ids_.find(key);
    const std::uint32_t id = found != nullptr ? *found : add(key, layer);
    Record& record = records_[id];
    const Row faded = fade(layer.num_events - record.last_use);
    for (std::size_t i = 0; i < kNumKernels; ++i)
      record.counts[i] = static_cast<float>(record.counts[i] * faded[i]);
    if (found != nullptr && record.last_use < layer.num_events) learn(record, layer);
    for (float& count : record.counts) count += 1;
    record.last_use = layer.num_events;
    return id;
  }
  /// Moves the weights to the kernels that made this use likely, before it is counted.
  void learn(const Record& record, Layer& layer) {
    Weights& weights = *layer.weights;
    std::array<double, kNumKernels + 1> parts;
    parts[kNumKernels] = weights.share[kNumKernels] * common(layer);
    double sum = parts[kNumKernels];
    for (std::size_t i = 0; i < kNumKernels; ++i)
      sum += parts[i] = weights.share[i] * record.counts[i] / std::max(1.0, layer.norms[i] - 1);
    const double rate = std::max(kLearningRate, 1 / (++weights.num_learned + 50));
    double total = 0;
    for (std::size_t i = 0; i <= kNumKernels; ++i) {
      double& share = weights.share[i];
      share += rate * (parts[i] / sum - share);
      total += share = std::max(share, kMinShare);
    }
    for (double& share : weights.share) share /= total;
  }

  std::uint32_t add(Key key, Layer& layer) {
    std::uint32_t id = static_cast<std::uint32_t>(records_.size());
    if (spare_.empty()) {
      records_.emplace_back();
    } else {
      id = spare_.back();
      spare_.pop_back();
      records_[id] = Record{};
    }
    records_[id].key = key;
    records_[id].last_use = layer.num_events;
    ids_.put(key, id);
    ++layer.num_known;
    return id;
  }
  void remove(std::uint32_t id) {
    Record& record = records_[id];
    Layer& layer = layer_of(partition_of(record.key));
    const std::uint32_t moved = layer.residents.back();
    layer.residents[record.place] = moved;
    records_[moved].place = record.place;
    layer.residents.pop_back();
    record.place = kNone;
    layer.last = kNone;
    away_.push_front(record.key);
    --size_;
  }
  void forget_old() {
    while (away_.size() > std::max(kMinAway, kMaxAway * size_)) {
      const Key key = *away_.pop_back({});
      --layer_of(partition_of(key)).num_known;
      spare_.push_back(*ids_.find(key));
      ids_.erase(key);
    }
  }

  /// The resident that is expected last of those that may go, or kNone.
  std::uint32_t last_expected(Layer& layer, const Evictable& evictable) {
    if (layer.last != kNone && evictable(records_[layer.last].key)) return layer.last;
    const std::vector<std::uint32_t>& residents = layer.residents;
    Search search;
    if (residents.size() > kSample)
      for (std::size_t i = 0; i < kSample; ++i)
        look(residents[next_random() % residents.size()], layer, evictable, search);
    if (search.admitted == kNone)
      for (const std::uint32_t id : residents) look(id, layer, evictable, search);
    layer.last = search.any;
    return search.admitted;
  }
  struct Search {
    double longest = -1, longest_admitted = -1;
    std::uint32_t any = kNone, admitted = kNone;
  };
  void look(std::uint32_t id, const Layer& layer, const Evictable& evictable,
            Search& search) const {
    const double rounds = wait(records_[id], layer);
    if (rounds > search.longest) {
      search.longest = rounds;
      search.any = id;
    }
    if (rounds > search.longest_admitted && evictable(records_[id].key)) {
      search.longest_admitted = rounds;
      search.admitted = id;
    }
  }
  /// SplitMix64.
  std::uint64_t next_random() {
    std::uint64_t mixed = random_ += 0x9E3779B97F4A7C15ull;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9ull;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBull;
    return mixed ^ mixed >> 31;
  }

  /// The last among all layers looks later than it is, as the worst of many guesses does. A layer
  /// pays with a block of its own unless another's is later by this margin.
  static constexpr double kOtherLayer = 0.7;
  static constexpr double kLearningRate = 0.002, kMinShare = 0.001;
  static constexpr std::size_t kMinAway = 32768, kMaxAway = 2;  // blocks that left, per resident

  std::uint64_t now_ = 0;  // events of all layers
  std::uint64_t random_ = 0;
  std::size_t size_ = 0;
  std::map<Partition, Layer> layers_;
  std::map<std::uint32_t, Weights> weights_;  // by kind and space
  std::vector<Record> records_;
  std::vector<std::uint32_t> spare_;  // records to use again
  FlatMap<std::uint32_t> ids_;
  RecencyList away_;  // known, not resident; the latest to leave first
};

}  // namespace tiered_mem
