// The only file that sees Python: the GIL, buffers, exceptions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <optional>
#include <set>

#include "block_reader.h"
#include "catalogue.h"
#include "checksum.h"
#include "direct_io.h"
#include "error.h"
#include "policy.h"
#include "tiers.h"

namespace py = pybind11;
using namespace tiered_mem;

namespace {

// --- the GIL ---

// Python's main thread, which alone handles signals and ends the interpreter.
bool in_main_thread() { return syscall(SYS_gettid) == getpid(); }

bool interpreter_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

// Gives the GIL up for its lifetime. A daemon thread that comes back when the interpreter is gone
// stops here: taking the GIL would end the thread through C++ frames, and so the process.
class NoGil {
 public:
  NoGil() = default;
  ~NoGil() {
    while (interpreter_is_ending() && !in_main_thread()) pause();
    PyEval_RestoreThread(state_);
  }
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

// --- errors ---

// The class of tiered_mem.errors that stands for an error of the core.
const char* error_name(const Error& error) {
  if (dynamic_cast<const IoError*>(&error)) return "TransferError";
  if (dynamic_cast<const ChecksumMismatch*>(&error)) return "ChecksumError";
  if (dynamic_cast<const StoreError*>(&error)) return "StoreError";
  if (dynamic_cast<const RuntimeClosed*>(&error)) return "RuntimeClosedError";
  if (dynamic_cast<const EventTooLarge*>(&error)) return "EventTooLargeError";
  if (dynamic_cast<const BudgetError*>(&error)) return "BudgetError";
  if (dynamic_cast<const ConfigError*>(&error)) return "ConfigError";
  return "TieredMemError";
}

// Imported when needed: the errors module must not be loaded by loading the extension.
py::object error_class(const char* name) {
  return py::module_::import("tiered_mem.errors").attr(name);
}

void bind_errors(py::module_&) {
  // Local: the translators of other extensions, which may know std::runtime_error, come after it.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      PyErr_SetString(error_class(error_name(error)).ptr(), error.what());
    }
  });
}

// --- store ---

py::buffer_info contiguous(const py::buffer& buffer, bool writable) {
  py::buffer_info info = buffer.request(writable);
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw ConfigError("the buffer is not contiguous");
  return info;
}

size_t nbytes(const py::buffer_info& info) {
  return static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize);
}

uint32_t checksum(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = contiguous(data, false);
  NoGil release;
  return crc32c(info.ptr, nbytes(info), seed);
}

// The result by every implementation this machine can run.
py::dict checksums(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = contiguous(data, false);
  py::dict results;
  for (const ChecksumImplementation& implementation : crc32c_implementations()) {
    const auto* bytes = static_cast<const unsigned char*>(info.ptr);
    results[implementation.name] =
        static_cast<uint32_t>(~implementation.update(~seed, bytes, nbytes(info)));
  }
  return results;
}

void read_block_into(const Extent& extent, const py::buffer& out) {
  const py::buffer_info info = contiguous(out, true);
  NoGil release;
  thread_local BlockReader reader;
  reader.read(extent, static_cast<std::byte*>(info.ptr), nbytes(info));
}

using Table = py::array_t<uint32_t, py::array::c_style>;

std::shared_ptr<Extent> extent_from_entry(std::shared_ptr<File> file, uint8_t codec,
                                          uint64_t block_nbytes, uint64_t offset,
                                          const Table& table) {
  if (table.ndim() != 2 || table.shape(1) != 3) throw ConfigError("table must be [chunks, 3]");
  return std::make_shared<Extent>(make_extent(std::move(file), static_cast<Codec>(codec),
                                              block_nbytes, offset, table.data(),
                                              static_cast<size_t>(table.shape(0))));
}

std::shared_ptr<Extent> parse(std::shared_ptr<File> file, const py::bytes& key,
                              const py::buffer& packed) {
  const py::buffer_info info = contiguous(packed, false);
  const std::string_view entry(static_cast<const char*>(info.ptr), nbytes(info));
  return std::make_shared<Extent>(parse_entry(std::move(file), std::string_view(key), entry));
}

void bind_store(py::module_& m) {
  m.attr("CHUNK_NBYTES") = kChunkNbytes;
  m.attr("IO_ALIGNMENT") = kIoAlignment;
  m.def("crc32c", &checksum, py::arg("data"), py::arg("seed") = 0,
        "CRC-32C of a contiguous buffer.");
  m.def("crc32c_by_implementation", &checksums, py::arg("data"), py::arg("seed") = 0,
        "CRC-32C by every implementation this machine can run, the one in use first.");
  m.def(
      "async_reads_available", [] { return BlockReader().async(); },
      "Whether one thread can keep several reads in flight here (Linux native AIO).");

  py::class_<File, std::shared_ptr<File>>(m, "File",
                                          "A file open for reading, by O_DIRECT if it can.")
      .def(py::init<std::string>(), py::arg("path"))
      .def_property_readonly("path", &File::path)
      .def_property_readonly("direct", &File::direct,
                             "False where reads go through the page cache.");

  py::class_<Extent, std::shared_ptr<Extent>>(m, "Extent", "Where a block's bytes lie in a file.")
      .def(py::init(&extent_from_entry), py::arg("file"), py::arg("codec"), py::arg("nbytes"),
           py::arg("offset"), py::arg("table"))
      .def_readonly("file", &Extent::file)
      .def_readonly("nbytes", &Extent::nbytes)
      .def_readonly("generation", &Extent::generation)
      .def_property_readonly("codec", [](const Extent& e) { return static_cast<int>(e.codec); })
      .def_property_readonly(
          "offset", [](const Extent& e) { return e.chunks.empty() ? 0 : e.chunks[0].offset; })
      .def_property_readonly("num_chunks", [](const Extent& e) { return e.chunks.size(); })
      .def_property_readonly("stored_nbytes", [](const Extent& e) {
        uint64_t sum = 0;
        for (const Chunk& chunk : e.chunks) sum += chunk.stored_nbytes;
        return sum;
      });

  m.def("parse_entry", &parse, py::arg("file"), py::arg("key"), py::arg("packed"),
        "Read a packed catalogue entry.");
  m.def("read_block", &read_block_into, py::arg("extent"), py::arg("out"),
        "Read, verify and decode a block into `out`. Lands in place if `out` is 4096-aligned.");
}

// --- runtime ---
//
// Every call that takes the runtime's lock gives the GIL up first: nobody ever waits for the lock
// while it holds the GIL.

using KeyArray = py::array_t<Key, py::array::c_style | py::array::forcecast>;
using Released = py::call_guard<NoGil>;

void raise_on_signal() {
  if (!in_main_thread()) return;
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::vector<Key> to_vector(const KeyArray& keys) {
  return std::vector<Key>(keys.data(), keys.data() + keys.size());
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

// Python's exception for a failed transfer, made but not raised.
py::object as_exception(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& known) {
    return error_class(error_name(known))(known.what());
  } catch (const std::exception& other) {
    return error_class("TransferError")(other.what());
  }
}

py::tuple wait_any(Event& event) {
  std::vector<Event::Failure> failures;
  std::vector<uint32_t> positions;
  {
    NoGil release;
    positions = event.wait_any(failures);
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
  return py::dict(
      "num_events"_a = s.num_events, "num_hbm_hits"_a = s.num_hbm_hits,
      "num_in_flight"_a = s.num_in_flight, "num_dram_hits"_a = s.num_dram_hits,
      "num_nvme_reads"_a = s.num_nvme_reads, "num_evictions"_a = s.num_evictions,
      "nbytes_missed"_a = s.nbytes_missed, "num_hints"_a = s.num_hints,
      "num_prefetched"_a = s.num_prefetched, "num_prefetched_used"_a = s.num_prefetched_used,
      "nbytes_prefetch_used"_a = s.nbytes_prefetch_used,
      "nbytes_prefetch_wasted"_a = s.nbytes_prefetch_wasted, "num_failed"_a = s.num_failed,
      "num_repaired"_a = s.num_repaired, "stall_ns"_a = s.stall_ns, "nbytes_moved"_a = moved,
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

std::shared_ptr<Tiers> make_tiers(uint64_t hbm, uint64_t dram, uint64_t hbm_reserved,
                                  uint64_t dram_reserved, const std::string& eviction,
                                  size_t num_io_threads) {
  TiersConfig config;
  config.hbm_nbytes = hbm;
  config.dram_nbytes = dram;
  config.hbm_reserved = hbm_reserved;
  config.dram_reserved = dram_reserved;
  config.eviction = eviction;
  config.num_io_threads = num_io_threads;
  // The last owner may be Python: closing waits for I/O, which others needn't wait for.
  const auto destroy = [](Tiers* tiers) {
    std::optional<NoGil> release;
    if (PyGILState_Check()) release.emplace();
    Tiers::destroy(tiers);
  };
  return std::shared_ptr<Tiers>(new Tiers(config, make_host_device(), raise_on_signal), destroy);
}

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

  void use(Key key) { residency_.use(known(key)); }
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
  void drop(Key key) {
    Block& block = known(key);
    if (block.pins > 0) throw ConfigError("drop: somebody pins this block");
    residency_.drop(block);
  }
  bool resize(std::uint64_t budget) {
    std::vector<Arena::Slab> released;
    return residency_.resize(budget, released);
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
      .def("wait_any", &wait_any,
           "(positions newly in place, [(position, error)]): waits until there is one.")
      .def("repaired", &Event::repaired, py::arg("position"), Released())
      .def("release", &Event::release, Released());

  py::class_<Tiers, std::shared_ptr<Tiers>>(m, "Tiers", "HBM, DRAM and the links to the store.")
      .def(py::init(&make_tiers), py::kw_only(), py::arg("hbm"), py::arg("dram"),
           py::arg("hbm_reserved") = 0, py::arg("dram_reserved") = 0, py::arg("eviction") = "lru",
           py::arg("num_io_threads") = 4)
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
      .def("remove_space", &Tiers::remove_space, py::arg("space"), Released())
      .def("acquire", &acquire, py::arg("keys"), py::arg("stream") = 0, py::arg("wait") = true)
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
      .def(
          "throttle",
          [](Tiers& tiers, const std::string& link, double bytes_per_second) {
            const Link which = link_of(link);
            NoGil release;
            tiers.throttle(which, bytes_per_second);
          },
          py::arg("link"), py::arg("bytes_per_second"))
      .def("stats", &stats)
      .def("precision", &precision)
      .def("hbm_memory", &Tiers::hbm_memory, Released())
      .def_property_readonly("closed",
                             [](Tiers& tiers) {
                               NoGil release;
                               return tiers.closed();
                             })
      .def("close", &Tiers::close, Released());

  m.def("eviction_policies", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> all;
    for (const PolicyInfo& policy : list_policies())
      all.emplace_back(policy.name, policy.summary, policy.source);
    return all;
  });
  m.def("check_eviction", [](const std::string& spec) { make_policy(spec); }, py::arg("spec"));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The core of tiered-mem in C++.";
  bind_errors(m);
  bind_store(m);
  bind_residency(m);
  bind_runtime(m);
}
