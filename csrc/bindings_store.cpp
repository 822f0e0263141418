// Python's view of the store's C++ part.
#include "bindings.h"
#include "block_reader.h"
#include "catalogue.h"
#include "checksum.h"
#include "direct_io.h"
#include "error.h"
#include "file_writer.h"

namespace tiered_mem {

namespace {

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

// Calls `act` without the GIL. A write that fails is an OSError with its number, which tells a full
// disk from a broken one.
template <typename Act>
auto writing(const Act& act) {
  try {
    NoGil release;
    return act();
  } catch (const IoError& error) {
    errno = error.error_number;
    PyErr_SetObject(PyExc_OSError, py::make_tuple(error.error_number, error.what()).ptr());
    throw py::error_already_set();
  }
}

std::unique_ptr<FileWriter> open_writer(std::string path) {
  return writing([&] { return std::make_unique<FileWriter>(std::move(path)); });
}

// The memory lives as long as the writer, which its arrays keep.
std::vector<py::array_t<uint8_t>> take(const py::object& self, const std::vector<size_t>& sizes) {
  FileWriter& writer = self.cast<FileWriter&>();
  std::byte* memory = writing([&] { return writer.take(sizes); });
  std::vector<py::array_t<uint8_t>> blocks;
  blocks.reserve(sizes.size());
  for (size_t size : sizes) {
    blocks.push_back({{size}, {size_t{1}}, reinterpret_cast<uint8_t*>(memory), self});
    memory += round_up(size, kIoAlignment);
  }
  return blocks;
}

uint64_t write_from(FileWriter& writer, const std::vector<py::buffer>& blocks,
                    const std::vector<uint64_t>& offsets) {
  std::vector<iovec> parts;
  parts.reserve(blocks.size());
  for (const py::buffer& block : blocks) {
    const py::buffer_info info = contiguous(block, false);
    parts.push_back({info.ptr, nbytes(info)});
  }
  return writing([&] { return writer.write_from(parts, offsets); });
}

void bind_writer(py::module_& m) {
  py::class_<FileWriter>(m, "FileWriter", "Writes to a file by O_DIRECT, several at once.")
      .def(py::init(&open_writer), py::arg("path"))
      .def_property_readonly("direct", &FileWriter::direct,
                             "False where writes go through the page cache.")
      .def(
          "reserve",
          [](FileWriter& w, uint64_t offset, uint64_t size) {
            writing([&] { w.reserve(offset, size); });
          },
          py::arg("offset"), py::arg("nbytes"), "Have the disk set bytes aside. Raises OSError.")
      .def(
          "truncate", [](FileWriter& w, uint64_t size) { writing([&] { w.truncate(size); }); },
          py::arg("nbytes"), "Cut the file. Raises OSError.")
      .def("take", &take, py::arg("sizes"),
           "Return memory for blocks, 4096-aligned, uint8, to fill until `write`. Waits for room.")
      .def(
          "write",
          [](FileWriter& w, const std::vector<uint64_t>& offsets) {
            writing([&] { w.write(offsets); });
          },
          py::arg("offsets"), "Begin to write what was taken last, each block to its place.")
      .def("write_from", &write_from, py::arg("blocks"), py::arg("offsets"),
           "Begin to write aligned memory, to be left as it is until `wait` for this number.")
      .def(
          "wait", [](FileWriter& w, uint64_t number) { writing([&] { w.wait(number); }); },
          py::arg("number"), "Wait until what `write_from` gave this number has been written.")
      .def(
          "flush", [](FileWriter& w) { writing([&] { w.flush(); }); },
          "Wait until the disk has all of it. Raises OSError of what failed since the last one.")
      .def(
          "discard", [](FileWriter& w) { writing([&] { w.discard(); }); },
          "Wait until nothing is on its way, and forget what failed.");
}

}  // namespace

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

  bind_writer(m);

  m.def("parse_entry", &parse, py::arg("file"), py::arg("key"), py::arg("packed"),
        "Read a packed catalogue entry.");
  m.def("read_block", &read_block_into, py::arg("extent"), py::arg("out"),
        "Read, verify and decode a block into `out`. Lands in place if `out` is 4096-aligned.");
}

}  // namespace tiered_mem
