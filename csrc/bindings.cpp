// The only file that sees Python: the GIL, buffers, exceptions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_reader.h"
#include "checksum.h"
#include "direct_io.h"
#include "error.h"
#include "policy.h"
#include "tiers.h"

namespace py = pybind11;
using namespace tiered_mem;

namespace {

// --- errors ---

void set_error(const char* name, const std::exception& error) {
  // Imported when needed: the errors module must not be loaded by loading the extension.
  py::object type = py::module_::import("tiered_mem.errors").attr(name);
  PyErr_SetString(type.ptr(), error.what());
}

void bind_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const IoError& error) {
      set_error("TransferError", error);
    } catch (const ChecksumMismatch& error) {
      set_error("ChecksumError", error);
    } catch (const StoreError& error) {
      set_error("StoreError", error);
    } catch (const RuntimeClosed& error) {
      set_error("RuntimeClosedError", error);
    } catch (const EventTooLarge& error) {
      set_error("EventTooLargeError", error);
    } catch (const BudgetError& error) {
      set_error("BudgetError", error);
    } catch (const ConfigError& error) {
      set_error("ConfigError", error);
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

template <uint32_t (*Function)(const void*, size_t, uint32_t)>
uint32_t checksum(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = contiguous(data, false);
  py::gil_scoped_release release;
  return Function(info.ptr, nbytes(info), seed);
}

void read_block_into(const Extent& extent, const py::buffer& out) {
  const py::buffer_info info = contiguous(out, true);
  py::gil_scoped_release release;
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

void bind_store(py::module_& m) {
  m.attr("CHUNK_NBYTES") = kChunkNbytes;
  m.attr("IO_ALIGNMENT") = kIoAlignment;
  m.def("crc32c", &checksum<crc32c>, py::arg("data"), py::arg("seed") = 0,
        "CRC-32C of a contiguous buffer.");
  m.def("crc32c_software", &checksum<crc32c_software>, py::arg("data"), py::arg("seed") = 0,
        "CRC-32C by table lookups: what crc32c is tested against.");
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
      .def_property_readonly(
          "offset", [](const Extent& e) { return e.chunks.empty() ? 0 : e.chunks[0].offset; })
      .def_property_readonly("num_chunks", [](const Extent& e) { return e.chunks.size(); })
      .def_property_readonly("stored_nbytes", [](const Extent& e) {
        uint64_t sum = 0;
        for (const Chunk& chunk : e.chunks) sum += chunk.stored_nbytes;
        return sum;
      });

  m.def("read_block", &read_block_into, py::arg("extent"), py::arg("out"),
        "Read, verify and decode a block into `out`. Lands in place if `out` is 4096-aligned.");
}

// --- runtime ---
//
// Every call that takes the runtime's lock gives the GIL up first: nobody ever waits for the lock
// while it holds the GIL.

using KeyArray = py::array_t<Key, py::array::c_style | py::array::forcecast>;
using Released = py::call_guard<py::gil_scoped_release>;

void raise_on_signal() {
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::vector<Key> to_vector(const KeyArray& keys) {
  return std::vector<Key>(keys.data(), keys.data() + keys.size());
}

std::shared_ptr<Event> acquire(Tiers& tiers, const KeyArray& keys, uint64_t stream, bool wait) {
  const Key* data = keys.data();
  const auto num_keys = static_cast<size_t>(keys.size());
  py::gil_scoped_release release;
  return tiers.acquire(data, num_keys, stream, wait);
}

void hint(Tiers& tiers, const KeyArray& keys, uint64_t stream, bool exact) {
  const Key* data = keys.data();
  const auto num_keys = static_cast<size_t>(keys.size());
  py::gil_scoped_release release;
  tiers.hint(data, num_keys, stream, exact);
}

// Python's exception for a failed transfer, made but not raised.
py::object as_exception(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const ChecksumMismatch& mismatch) {
    return py::module_::import("tiered_mem.errors").attr("ChecksumError")(mismatch.what());
  } catch (const std::exception& other) {
    return py::module_::import("tiered_mem.errors").attr("TransferError")(other.what());
  }
}

py::tuple wait_any(Event& event) {
  std::vector<Event::Failure> failures;
  std::vector<uint32_t> positions;
  {
    py::gil_scoped_release release;
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
    py::gil_scoped_release release;
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
    py::gil_scoped_release release;
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
  return std::make_shared<Tiers>(config, make_host_device(), raise_on_signal);
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
            py::gil_scoped_release release;
            tiers.add_blocks(names, std::move(sources));
          },
          py::arg("keys"), py::arg("extents"))
      .def("remove_space", &Tiers::remove_space, py::arg("space"), Released())
      .def("acquire", &acquire, py::arg("keys"), py::arg("stream") = 0, py::arg("wait") = true)
      .def("hint", &hint, py::arg("keys"), py::arg("stream") = 0, py::arg("exact") = false)
      .def("resident", &Tiers::resident, py::arg("key"), Released())
      .def(
          "num_resident",
          [](Tiers& tiers, const KeyArray& keys) {
            const Key* data = keys.data();
            const auto num_keys = static_cast<size_t>(keys.size());
            py::gil_scoped_release release;
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
            py::gil_scoped_release release;
            tiers.throttle(which, bytes_per_second);
          },
          py::arg("link"), py::arg("bytes_per_second"))
      .def("stats", &stats)
      .def("precision", &precision)
      .def("hbm_memory", &Tiers::hbm_memory, Released())
      .def_property_readonly("closed",
                             [](Tiers& tiers) {
                               py::gil_scoped_release release;
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
  bind_runtime(m);
}
