// The only file that sees Python: the GIL, buffers, exceptions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checksum.h"
#include "direct_io.h"
#include "error.h"

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
  thread_local ReadContext context;
  read_block(extent, static_cast<std::byte*>(info.ptr), nbytes(info), context);
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
      "async_reads_available", [] { return AsyncReads().available(); },
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

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The core of tiered-mem in C++.";
  bind_errors(m);
  bind_store(m);
}
