#pragma once

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "eviction/adaptive.h"

namespace tiered_mem {

/// Evicts the block whose next use is predicted last: `adaptive`, told of what is to come.
///
/// A hint says that the next event of a layer uses a block. It is believed as far as hints of that
/// layer came true more often than the block's past would have had it, and blocks that weren't
/// hinted are doubted as far as those that were made up the event. Hints that are no better than
/// chance hence change nothing, and what remains is the estimate by past uses.
class HintAware final : public Adaptive {
 public:
  void begin_event(Partition partition) override {
    Adaptive::begin_event(partition);
    const auto found = hints_.find(partition);
    if (found != hints_.end()) found->second.begin_event();
  }
  void insert(Key key, std::uint64_t nbytes) override {
    judge(key);
    Adaptive::insert(key, nbytes);
  }
  bool touch(Key key) override {
    const Record* record = find(key);
    if (record == nullptr || record->place == kNone) return false;
    judge(key);
    return Adaptive::touch(key);
  }
  void hint(Key key, double probability) override {
    const Partition partition = partition_of(key);
    Hints& hints = hints_[partition];
    // The runtime takes hints back once the router has spoken: what was said is judged all the
    // same.
    if (const double* said = hints.open.find(key)) hints.taken_back.put(key, *said);
    hints.open.erase(key);
    if (probability > 0) hints.open.put(key, probability);
    layer_of(partition).last = kNone;
  }

 protected:
  double wait(const Record& record, const Layer& layer) const override {
    const double by_past = probability(record, layer);
    const auto found = hints_.find(partition_of(record.key));
    if (found == hints_.end() || found->second.open.size() == 0) return 1 / by_past;
    const Hints& hints = found->second;
    const double* hinted = hints.open.find(record.key);
    const double next = hinted != nullptr ? by_past + (1 - by_past) * *hinted * hints.trust()
                                          : by_past * (1 - hints.coverage());
    // In the next round, or else as its past has it.
    return 1 + (1 - next) / by_past;
  }

 private:
  /// What was predicted of a layer, and what came of it.
  struct Hints {
    FlatMap<double> open;        // probabilities, for the next event
    FlatMap<double> taken_back;  // the same, no longer believed
    FlatMap<double> due;         // both, for the event that goes on
    // Decayed sums over events that had hints: what hints promised and gained beyond the blocks'
    // past, and how many uses its past didn't foretell either.
    double promised = 0, gained = 0, unforetold = 0;

    double trust() const { return std::clamp(gained / (promised + 1), 0.0, 1.0); }
    double coverage() const { return std::clamp(gained / (unforetold + 1), 0.0, 1.0); }
    void begin_event() {
      open.each([&](Key key, double probability) { taken_back.put(key, probability); });
      due = std::exchange(taken_back, {});
      open = {};
      if (due.size() == 0) return;
      for (double* sum : {&promised, &gained, &unforetold}) *sum *= kKeep;
      is_new = true;
    }
    bool is_new = false;  // the event's hints aren't yet in the sums
  };
  static constexpr double kKeep = 0.95;  // of what was seen, an event

  /// Counts a use for or against the hints of its event.
  void judge(Key key) {
    const auto found = hints_.find(partition_of(key));
    if (found == hints_.end() || found->second.due.size() == 0) return;
    Hints& hints = found->second;
    const Layer& layer = layer_of(partition_of(key));
    if (std::exchange(hints.is_new, false)) promise(hints, layer);
    hints.unforetold += 1;
    if (hints.due.find(key) != nullptr) hints.gained += 1;
  }
  void promise(Hints& hints, const Layer& layer) {
    hints.due.each([&](Key key, double probability) {
      const double by_past = chance(key, layer);
      hints.promised += probability * (1 - by_past);
      hints.gained -= by_past;
      hints.unforetold -= by_past;
    });
  }
  /// Of the event that has begun, before it used anything.
  double chance(Key key, const Layer& layer) const {
    if (const Record* record = find(key)) return probability(*record, layer);
    return layer.num_known == 0 ? 0 : std::min(1.0, common(layer));
  }

  std::unordered_map<Partition, Hints> hints_;
};

}  // namespace tiered_mem
