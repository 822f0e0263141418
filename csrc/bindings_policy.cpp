// Eviction policies written in Python, and the names of all policies.
#include <optional>
#include <string>

#include "bindings.h"
#include "error.h"
#include "flat_map.h"
#include "policy.h"

namespace tiered_mem {

namespace {

// What a plug-in's `evict` is called with: callable with a key while that call lasts.
struct Admits {
  const Evictable* evictable = nullptr;

  bool operator()(Key key) const {
    if (evictable == nullptr) throw ConfigError("evictable() may be asked during evict() only");
    return (*evictable)(key);
  }
};

// A policy in Python. What it answers is checked against the blocks that it was told of, so a
// plug-in that is wrong is named, and the tier's accounts stay right.
class PythonPolicy final : public EvictionPolicy {
 public:
  PythonPolicy(std::string name, const py::object& policy)
      : name_(std::move(name)),
        insert_(policy.attr("insert")),
        touch_(policy.attr("touch")),
        erase_(policy.attr("erase")),
        evict_(policy.attr("evict")),
        set_budget_(if_defined(policy, "set_budget")),
        begin_event_(if_defined(policy, "begin_event")),
        hint_(if_defined(policy, "hint")),
        admits_(py::cast(Admits{})) {}

  ~PythonPolicy() override {
    if (interpreter_is_ending()) {  // what it refers to is gone or going: leave it
      for (py::object* object :
           {&insert_, &touch_, &erase_, &evict_, &set_budget_, &begin_event_, &hint_, &admits_})
        object->release();
      return;
    }
    const Gil gil;
    for (py::object* object :
         {&insert_, &touch_, &erase_, &evict_, &set_budget_, &begin_event_, &hint_, &admits_})
      *object = py::object();
  }

  void set_budget(std::uint64_t nbytes) override {
    if (set_budget_) tell("set_budget", set_budget_, nbytes);
  }
  void begin_event(Partition partition) override {
    if (begin_event_) tell("begin_event", begin_event_, partition & 0xFFFF);
  }
  void insert(Key key, std::uint64_t nbytes) override {
    nbytes_.put(key, nbytes);
    tell("insert", insert_, key, nbytes);
  }
  bool touch(Key key) override {
    if (nbytes_.find(key) == nullptr) return false;
    tell("touch", touch_, key);
    return true;
  }
  void erase(Key key) override {
    if (nbytes_.erase(key)) tell("erase", erase_, key);
  }
  void hint(Key key, double probability) override {
    if (hint_) tell("hint", hint_, key, probability);
  }
  std::size_t size() const override { return nbytes_.size(); }

  std::optional<Key> evict(const Evictable& evictable, Key incoming) override {
    if (nbytes_.size() == 0) return std::nullopt;
    const std::optional<Key> key = ask(evictable, incoming);
    if (!key) {
      bool any = false;
      nbytes_.each([&](Key known, std::uint64_t) { any |= evictable(known); });
      if (any) wrong("returned no key though there are blocks that may be evicted: too few bytes");
      return std::nullopt;
    }
    if (nbytes_.find(*key) == nullptr)
      wrong("returned key " + std::to_string(*key) + ", which isn't resident");
    if (!evictable(*key))
      wrong("returned key " + std::to_string(*key) +
            ", which may not be evicted now: it is pinned or on its way (ask evictable(key))");
    nbytes_.erase(*key);
    return key;
  }

  void rethrow() override {
    if (!error_) return;
    const std::string error = *std::exchange(error_, std::nullopt);
    throw PolicyError(error);
  }

 private:
  // A method of the base class that does nothing isn't called.
  static py::object if_defined(const py::object& policy, const char* method) {
    const py::object base = py::module_::import("tiered_mem.policy").attr("EvictionPolicy");
    const py::object own = py::type::of(policy).attr(method);
    return own.is(base.attr(method)) ? py::object() : py::object(policy.attr(method));
  }

  std::optional<Key> ask(const Evictable& evictable, Key incoming) {
    const PluginCall call;
    if (!call) return first(evictable);  // nobody will ask again
    const PolicyCall inside;
    // Callers know the blocks that they told of, and may be asked for no other.
    const auto known = [&](Key key) { return nbytes_.find(key) != nullptr && evictable(key); };
    const Evictable known_and_evictable(known);
    Admits& admits = admits_.cast<Admits&>();
    admits.evictable = &known_and_evictable;
    struct Reset {
      Admits& admits;
      ~Reset() { admits.evictable = nullptr; }
    } reset{admits};
    try {
      const py::object answer =
          evict_(admits_, incoming == kNoKey ? py::object(py::none()) : py::int_(incoming));
      if (answer.is_none()) return std::nullopt;
      const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(answer.ptr()));
      if (!index) throw py::error_already_set();
      const Key key = PyLong_AsUnsignedLongLong(index.ptr());
      if (PyErr_Occurred()) throw py::error_already_set();
      return key;
    } catch (py::error_already_set& error) {
      throw PolicyError(describe("evict", error));
    }
  }

  std::optional<Key> first(const Evictable& evictable) const {
    std::optional<Key> found;
    nbytes_.each([&](Key key, std::uint64_t) {
      if (!found && evictable(key)) found = key;
    });
    return found;
  }

  // Calls that only tell can't fail: residency is in the midst of a change. The error waits.
  template <class... Arguments>
  void tell(const char* method, const py::object& callable, Arguments... arguments) {
    const PluginCall call;
    if (!call) return;
    const PolicyCall inside;
    try {
      callable(arguments...);
    } catch (py::error_already_set& error) {
      const std::string what = describe(method, error);
      if (!error_) error_ = what;
    }
  }

  std::string describe(const char* method, py::error_already_set& error) const {
    const std::string type = error.type().attr("__name__").cast<std::string>();
    std::string what = "eviction policy '" + name_ + "': " + method + "() raised " + type;
    try {
      const py::object text = py::str(error.value()).attr("encode")("utf-8", "replace");
      what += ": " + text.cast<std::string>();
    } catch (py::error_already_set&) {  // its text raises in turn: go without
    }
    // Raised again where it can be; last, since making a text would already raise it.
    if (error.matches(PyExc_KeyboardInterrupt)) PyErr_SetInterrupt();
    return what;
  }

  [[noreturn]] void wrong(const std::string& what) const {
    throw PolicyError("eviction policy '" + name_ + "': evict() " + what);
  }

  std::string name_;
  py::object insert_, touch_, erase_, evict_, set_budget_, begin_event_, hint_;
  py::object admits_;
  FlatMap<std::uint64_t> nbytes_;
  std::optional<std::string> error_;
};

// The factory lives as long as the process, and is never freed: nobody could say under which GIL.
void register_eviction(const std::string& name, const py::object& factory) {
  py::object* const kept = new py::object(factory);
  register_policy(name, [name, kept]() -> std::unique_ptr<EvictionPolicy> {
    const py::gil_scoped_acquire gil;
    try {
      return std::make_unique<PythonPolicy>(name, (*kept)());
    } catch (py::error_already_set& error) {
      const std::string type = error.type().attr("__name__").cast<std::string>();
      throw PolicyError("eviction policy '" + name + "' can't be made: " + type + ": " +
                        py::str(error.value()).cast<std::string>());
    }
  });
}

}  // namespace

void bind_policy(py::module_& m) {
  py::class_<Admits>(m, "Evictable", "Says whether a block may be evicted now.")
      .def("__call__", &Admits::operator(), py::arg("key"));
  m.def("register_eviction", &register_eviction, py::arg("name"), py::arg("factory"),
        "Makes a policy in Python known: `factory()` returns a new one. ConfigError for a "
        "built-in's name.");
  m.def("eviction_policies", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> all;
    for (const PolicyInfo& policy : list_policies())
      all.emplace_back(policy.name, policy.summary, policy.source);
    return all;
  });
  m.def("check_eviction", [](const std::string& spec) { make_policy(spec); }, py::arg("spec"));
}

}  // namespace tiered_mem
