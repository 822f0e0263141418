// Python's view of residency and policy without bytes.
#include <set>

#include "bindings.h"
#include "error.h"
#include "residency.h"

namespace tiered_mem {

namespace {

// Residency and policy without bytes: what the simulator drives. Not for several threads.
class BareResidency {
 public:
  BareResidency(std::uint64_t budget, const std::string& eviction, std::uint64_t reserved)
      : residency_(Arena(budget, reserved), make_policy(eviction)) {}

  // "ok", "busy" or "too_large", and the keys that had to go.
  std::pair<std::string, std::vector<Key>> admit(const KeyArray& keys,
                                                 const py::array_t<std::uint64_t>& nbytes,
                                                 bool guessed) {
    if (keys.size() != nbytes.size()) throw ConfigError("admit: as many sizes as keys, please");
    std::vector<Wanted> wanted;
    std::set<Key> seen;
    for (py::ssize_t i = 0; i < keys.size(); ++i) {
      wanted.push_back({keys.data()[i], nbytes.data()[i]});
      if (wanted.back().nbytes == 0) throw ConfigError("admit: a block has bytes");
      if (residency_.find(wanted.back().key) || !seen.insert(wanted.back().key).second)
        throw ConfigError("admit: a block that is there already, or named twice");
    }
    std::vector<Victim> victims;
    const char* const names[] = {"ok", "busy", "too_large"};
    const Admission admission =
        residency_.admit(wanted, guessed ? Entry::guessed : Entry::demanded, victims);
    residency_.policy().rethrow();
    std::vector<Key> gone;
    for (const Victim& victim : victims) gone.push_back(victim.key);
    return {names[static_cast<std::size_t>(admission)], gone};
  }

  // (slot, slot_nbytes, pins, state, guessed) or None.
  py::object find(Key key) {
    const Block* block = residency_.find(key);
    if (block == nullptr) return py::none();
    const char* const states[] = {"loading", "ready", "failed"};
    return py::make_tuple(block->slot, block->slot_nbytes, block->pins,
                          states[static_cast<std::size_t>(block->state)], block->guessed);
  }

  void use(Key key) {
    residency_.use(known(key));
    residency_.policy().rethrow();
  }
  void pin(Key key) { residency_.pin(known(key)); }
  void unpin(Key key) {
    Block& block = known(key);
    if (block.pins == 0) throw ConfigError("unpin: nobody pins this block");
    residency_.unpin(block);
  }
  void mark_ready(Key key) {
    Block& block = known(key);
    if (block.state != State::ready) residency_.mark_ready(block);
  }
  void protect(Key key, bool on) { residency_.protect(known(key), on); }
  void begin_event(Key key) { residency_.policy().begin_event(partition_of(key)); }
  void hint(Key key, double probability) { residency_.policy().hint(key, probability); }
  void drop(Key key) {
    Block& block = known(key);
    if (block.pins > 0) throw ConfigError("drop: somebody pins this block");
    residency_.drop(block);
    residency_.policy().rethrow();
  }
  bool resize(std::uint64_t budget) {
    std::vector<Arena::Slab> released;
    const bool complete = residency_.resize(budget, released);
    residency_.policy().rethrow();
    return complete;
  }

  std::vector<Key> keys() {
    std::vector<Key> all;
    residency_.each([&](const Block& block) { all.push_back(block.key); });
    return all;
  }
  const Residency& get() const { return residency_; }

 private:
  Block& known(Key key) {
    Block* block = residency_.find(key);
    if (block == nullptr) throw ConfigError("block " + std::to_string(key) + " isn't resident");
    return *block;
  }

  Residency residency_;
};

}  // namespace

void bind_residency(py::module_& m) {
  py::class_<BareResidency>(m, "Residency", "One tier's residency and policy, without bytes.")
      .def(py::init<std::uint64_t, std::string, std::uint64_t>(), py::arg("budget"),
           py::arg("eviction") = "lru", py::arg("reserved") = 0)
      .def("admit", &BareResidency::admit, py::arg("keys"), py::arg("nbytes"),
           py::arg("guessed") = false,
           "('ok' | 'busy' | 'too_large', victims): makes room for all blocks, in state loading, "
           "or changes nothing.")
      .def("find", &BareResidency::find, py::arg("key"),
           "(slot, slot_nbytes, pins, state, guessed), or None.")
      .def("use", &BareResidency::use, py::arg("key"))
      .def("pin", &BareResidency::pin, py::arg("key"))
      .def("unpin", &BareResidency::unpin, py::arg("key"))
      .def("mark_ready", &BareResidency::mark_ready, py::arg("key"))
      .def("protect", &BareResidency::protect, py::arg("key"), py::arg("on"))
      .def("begin_event", &BareResidency::begin_event, py::arg("key"))
      .def("hint", &BareResidency::hint, py::arg("key"), py::arg("probability"))
      .def("drop", &BareResidency::drop, py::arg("key"))
      .def("resize", &BareResidency::resize, py::arg("budget"), "False while pins hold slabs back.")
      .def("keys", &BareResidency::keys)
      .def("__len__", [](const BareResidency& r) { return r.get().num_blocks(); })
      .def_property_readonly("budget",
                             [](const BareResidency& r) { return r.get().arena().budget(); })
      .def_property_readonly("nbytes_used",
                             [](const BareResidency& r) { return r.get().nbytes_used(); })
      .def_property_readonly("nbytes_cut",
                             [](const BareResidency& r) { return r.get().arena().nbytes_cut(); })
      .def_property_readonly("num_evictions",
                             [](const BareResidency& r) { return r.get().num_evictions(); });
}

}  // namespace tiered_mem
