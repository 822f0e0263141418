// Python's view of the runtime.
//
// Every call that takes the runtime's lock gives the GIL up first: nobody ever waits for the lock
// while it holds the GIL.
#include <map>
#include <optional>

#include "bindings.h"
#include "error.h"
#include "tiers.h"

namespace tiered_mem {

namespace {

using Released = py::call_guard<NoGil>;

void raise_on_signal() {
  if (!in_main_thread()) return;
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::shared_ptr<Event> acquire(Tiers& tiers, const KeyArray& keys, uint64_t stream, bool wait) {
  const Key* data = keys.data();
  const auto num_keys = static_cast<size_t>(keys.size());
  NoGil release;
  return tiers.acquire(data, num_keys, stream, wait);
}

void hint(Tiers& tiers, const KeyArray& keys, uint64_t stream, bool exact) {
  const Key* data = keys.data();
  const auto num_keys = static_cast<size_t>(keys.size());
  NoGil release;
  tiers.hint(data, num_keys, stream, exact);
}

// A device's memory that a Python object holds.
class HeldMemory final : public Memory {
 public:
  HeldMemory(uint64_t address, uint64_t nbytes, py::object owner)
      : address_(address), nbytes_(nbytes), owner_(new py::object(std::move(owner))) {}
  ~HeldMemory() override {
    const PluginCall python;
    if (python) delete owner_;  // else the interpreter is gone, and the memory with it
  }
  std::byte* data() const override {
    return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address_));
  }
  uint64_t nbytes() const override { return nbytes_; }

 private:
  uint64_t address_, nbytes_;
  py::object* owner_;
};

void add_segment(Tiers& tiers, uint64_t address, uint64_t nbytes, py::object owner) {
  auto segment = std::make_shared<HeldMemory>(address, nbytes, std::move(owner));
  NoGil release;
  tiers.add_segment(std::move(segment));
  segment.reset();
}

py::tuple wait_any(Event& event, Compute compute) {
  std::vector<Event::Failure> failures;
  std::vector<uint32_t> positions;
  {
    NoGil release;
    positions = event.wait_any(failures, compute);
  }
  py::list failed;
  for (const Event::Failure& failure : failures)
    failed.append(py::make_tuple(failure.position, as_exception(failure.error)));
  return py::make_tuple(py::cast(positions), failed);
}

Link link_of(const std::string& name) {
  for (size_t i = 0; i < kNumLinks; ++i)
    if (name == link_name(static_cast<Link>(i))) return static_cast<Link>(i);
  throw ConfigError("unknown link '" + name + "'; there are nvme_to_hbm, dram_to_hbm, hbm_to_dram");
}

py::dict stats(Tiers& tiers) {
  TiersStats s;
  uint64_t hbm_used, dram_used;
  {
    NoGil release;
    s = tiers.stats();
    hbm_used = tiers.hbm_nbytes_used();
    dram_used = tiers.dram_nbytes_used();
  }
  using namespace py::literals;
  py::dict moved;
  for (size_t i = 0; i < kNumLinks; ++i) moved[link_name(static_cast<Link>(i))] = s.nbytes_moved[i];
  return py::dict("num_events"_a = s.num_events, "num_hbm_hits"_a = s.num_hbm_hits,
                  "num_in_flight"_a = s.num_in_flight, "num_dram_hits"_a = s.num_dram_hits,
                  "num_nvme_reads"_a = s.num_nvme_reads, "num_evictions"_a = s.num_evictions,
                  "nbytes_hit"_a = s.nbytes_hit, "nbytes_missed"_a = s.nbytes_missed,
                  "num_hints"_a = s.num_hints, "num_prefetched"_a = s.num_prefetched,
                  "num_prefetched_used"_a = s.num_prefetched_used,
                  "nbytes_prefetch_used"_a = s.nbytes_prefetch_used,
                  "nbytes_prefetch_wasted"_a = s.nbytes_prefetch_wasted,
                  "num_failed"_a = s.num_failed, "num_repaired"_a = s.num_repaired,
                  "stall_ns"_a = s.stall_ns, "nbytes_moved"_a = moved,
                  "hbm_nbytes_used"_a = hbm_used, "dram_nbytes_used"_a = dram_used);
}

py::dict precision(Tiers& tiers) {
  std::map<Partition, HintBook::Precision> all;
  {
    NoGil release;
    all = tiers.precision();
  }
  py::dict result;
  for (const auto& [partition, seen] : all)
    result[py::int_(partition)] = py::make_tuple(seen.num_hints, seen.num_right, seen.on);
  return result;
}

LinkSpeeds to_link_speeds(const py::object& links) {
  LinkSpeeds speeds;
  for (const auto& [name, speed] : links.cast<std::map<std::string, std::pair<double, double>>>())
    speeds[static_cast<size_t>(link_of(name))] = {speed.first, speed.second};
  return speeds;
}

// Blocks that lie nowhere, for virtual links.
void add_virtual_blocks(
    Tiers& tiers, const KeyArray& keys,
    const py::array_t<uint64_t, py::array::c_style | py::array::forcecast>& sizes) {
  if (keys.size() != sizes.size()) throw ConfigError("as many sizes as keys, please");
  std::map<uint64_t, std::shared_ptr<const Extent>> by_size;
  std::vector<std::shared_ptr<const Extent>> extents;
  for (py::ssize_t i = 0; i < sizes.size(); ++i) {
    auto& extent = by_size[sizes.data()[i]];
    if (!extent) extent = std::make_shared<Extent>(nowhere(sizes.data()[i]));
    extents.push_back(extent);
  }
  const std::vector<Key> names = to_vector(keys);
  NoGil release;
  tiers.add_blocks(names, std::move(extents));
}

// (what happened uint8, key uint64), in order.
py::tuple take_log(Tiers& tiers) {
  std::vector<LogEntry> log;
  {
    NoGil release;
    log = tiers.take_log();
  }
  py::array_t<uint8_t> happenings(static_cast<py::ssize_t>(log.size()));
  py::array_t<Key> keys(static_cast<py::ssize_t>(log.size()));
  for (size_t i = 0; i < log.size(); ++i) {
    happenings.mutable_data()[i] = static_cast<uint8_t>(log[i].happening);
    keys.mutable_data()[i] = log[i].key;
  }
  return py::make_tuple(happenings, keys);
}

std::shared_ptr<Tiers> make_tiers(uint64_t hbm, uint64_t dram, uint64_t hbm_reserved,
                                  uint64_t dram_reserved, const std::string& eviction,
                                  size_t num_io_threads, const py::object& virtual_links,
                                  const std::optional<KeyArray>& future,
                                  std::shared_ptr<Device> device, double watchdog_seconds,
                                  bool copy_back) {
  TiersConfig config;
  config.hbm_nbytes = hbm;
  config.dram_nbytes = dram;
  config.hbm_reserved = hbm_reserved;
  config.dram_reserved = dram_reserved;
  config.eviction = eviction;
  config.num_io_threads = num_io_threads;
  config.watchdog_seconds = watchdog_seconds;
  config.copy_back = copy_back;
  if (!device) device = make_host_device();
  if (future) config.future = to_vector(*future);
  if (!virtual_links.is_none()) config.virtual_links = to_link_speeds(virtual_links);
  // The last owner may be Python: closing waits for I/O, which others needn't wait for.
  const auto destroy = [](Tiers* tiers) {
    std::optional<NoGil> release;
    if (PyGILState_Check()) release.emplace();
    Tiers::destroy(tiers);
  };
  return std::shared_ptr<Tiers>(new Tiers(config, std::move(device), raise_on_signal), destroy);
}

}  // namespace

void bind_runtime(py::module_& m) {
  py::class_<Memory, std::shared_ptr<Memory>>(m, "Memory", py::buffer_protocol(),
                                              "A tier's memory, alive as long as a view of it.")
      .def_buffer([](Memory& memory) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(memory.data()),
                               static_cast<py::ssize_t>(memory.nbytes()));
      })
      .def_property_readonly("nbytes", &Memory::nbytes);

  py::class_<Event, std::shared_ptr<Event>>(m, "Event", "A layer step's keys, pinned in HBM.")
      .def_property_readonly("slots", &Event::slots, "Byte offsets in HBM, by position.")
      .def("wait_any", &wait_any, py::arg("compute") = 0,
           "(positions newly in place, [(position, error)]): waits until there is one.")
      .def("repaired", &Event::repaired, py::arg("position"), Released())
      .def("release", &Event::release, py::arg("compute") = 0, Released());

  py::class_<Tiers, std::shared_ptr<Tiers>>(m, "Tiers", "HBM, DRAM and the links to the store.")
      .def(py::init(&make_tiers), py::kw_only(), py::arg("hbm"), py::arg("dram"),
           py::arg("hbm_reserved") = 0, py::arg("dram_reserved") = 0, py::arg("eviction") = "lru",
           py::arg("num_io_threads") = 4, py::arg("virtual_links") = py::none(),
           py::arg("future") = py::none(), py::arg("device") = py::none(),
           py::arg("watchdog_seconds") = 60.0, py::arg("copy_back") = true)
      .def(
          "add_blocks",
          [](Tiers& tiers, const KeyArray& keys,
             const std::vector<std::shared_ptr<Extent>>& extents) {
            std::vector<std::shared_ptr<const Extent>> sources(extents.begin(), extents.end());
            const std::vector<Key> names = to_vector(keys);
            NoGil release;
            tiers.add_blocks(names, std::move(sources));
          },
          py::arg("keys"), py::arg("extents"))
      .def("add_virtual_blocks", &add_virtual_blocks, py::arg("keys"), py::arg("nbytes"))
      .def("remove_space", &Tiers::remove_space, py::arg("space"), Released())
      .def(
          "remove_blocks",
          [](Tiers& tiers, const KeyArray& keys) {
            const std::vector<Key> names = to_vector(keys);
            NoGil release;
            tiers.remove_blocks(names);
          },
          py::arg("keys"))
      .def(
          "create",
          [](Tiers& tiers, const KeyArray& keys, uint64_t stream, Compute compute) {
            const Key* data = keys.data();
            const auto num_keys = static_cast<size_t>(keys.size());
            NoGil release;
            return tiers.create(data, num_keys, stream, compute);
          },
          py::arg("keys"), py::arg("stream") = 0, py::arg("compute") = 0)
      .def("acquire", &acquire, py::arg("keys"), py::arg("stream") = 0, py::arg("wait") = true)
      .def("add_segment", &add_segment, py::arg("address"), py::arg("nbytes"), py::arg("owner"),
           "Memory of the device for HBM, held by `owner` until it is given back.")
      .def(
          "acquire_resident",
          [](Tiers& tiers, const KeyArray& keys, uint64_t stream) {
            const Key* data = keys.data();
            const auto num_keys = static_cast<size_t>(keys.size());
            NoGil release;
            return tiers.acquire_resident(data, num_keys, stream);
          },
          py::arg("keys"), py::arg("stream") = 0)
      .def(
          "note_uses",
          [](Tiers& tiers, const KeyArray& keys) {
            const Key* data = keys.data();
            const auto num_keys = static_cast<size_t>(keys.size());
            NoGil release;
            tiers.note_uses(data, num_keys);
          },
          py::arg("keys"))
      .def("hint", &hint, py::arg("keys"), py::arg("stream") = 0, py::arg("exact") = false)
      .def(
          "announce",
          [](Tiers& tiers, const KeyArray& keys, uint64_t stream) {
            const Key* data = keys.data();
            const auto num_keys = static_cast<size_t>(keys.size());
            py::gil_scoped_release release;
            return tiers.announce(data, num_keys, stream);
          },
          py::arg("keys"), py::arg("stream") = 0)
      .def("resident", &Tiers::resident, py::arg("key"), Released())
      .def(
          "num_resident",
          [](Tiers& tiers, const KeyArray& keys) {
            const Key* data = keys.data();
            const auto num_keys = static_cast<size_t>(keys.size());
            NoGil release;
            return tiers.num_resident(data, num_keys);
          },
          py::arg("keys"))
      .def("max_event", &Tiers::max_event, py::arg("nbytes"), Released())
      .def("resize_hbm", &Tiers::resize_hbm, py::arg("nbytes"), Released())
      .def("resize_dram", &Tiers::resize_dram, py::arg("nbytes"), Released())
      .def("pin_dram", &Tiers::pin_dram, py::arg("nbytes"), Released())
      .def(
          "throttle",
          [](Tiers& tiers, const std::string& link, double bytes_per_second) {
            const Link which = link_of(link);
            NoGil release;
            tiers.throttle(which, bytes_per_second);
          },
          py::arg("link"), py::arg("bytes_per_second"))
      .def("now", &Tiers::now, Released(), "Seconds on the runtime's clock.")
      .def("advance", &Tiers::advance, py::arg("seconds"), Released(),
           "Lets time pass on a virtual clock.")
      .def("keep_log", &Tiers::keep_log, py::arg("on"), Released())
      .def("take_log", &take_log, "(happenings uint8, keys uint64) since the last call.")
      .def("stats", &stats)
      .def("precision", &precision)
      .def("hbm_memory", &Tiers::hbm_memory, Released())
      .def_property_readonly("closed",
                             [](Tiers& tiers) {
                               NoGil release;
                               return tiers.closed();
                             })
      .def("close", &Tiers::close, Released());

  m.attr("HAPPENINGS") =
      py::make_tuple("event", "hit", "in_flight", "dram_hit", "nvme_read", "prefetch", "evict");
}

}  // namespace tiered_mem
