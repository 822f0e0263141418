#include "catalogue.h"

#include <cstring>
#include <vector>

#include "checksum.h"
#include "error.h"

namespace tiered_mem {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "entries are little-endian");

struct Header {
  uint32_t crc;  // of the key and of all that follows
  uint8_t codec;
  uint8_t apart;  // in the file of payloads: who gives the file has looked
  uint8_t reserved[2];
  uint64_t nbytes, generation, offset;
};
static_assert(sizeof(Header) == 32, "no padding");

}  // namespace

Extent parse_entry(std::shared_ptr<File> file, std::string_view key, std::string_view packed) {
  constexpr size_t kRowNbytes = 3 * sizeof(uint32_t);
  Header header{};
  std::memcpy(&header, packed.data(), std::min(packed.size(), sizeof header));
  const size_t summed = packed.size() - std::min(packed.size(), sizeof header.crc);
  const uint32_t crc =
      crc32c(packed.data() + packed.size() - summed, summed, crc32c(key.data(), key.size()));
  if (packed.size() < sizeof header || (packed.size() - sizeof header) % kRowNbytes != 0 ||
      crc != header.crc) {
    throw ChecksumMismatch("a catalogue entry of " + file->path() + " is damaged");
  }
  std::vector<uint32_t> table((packed.size() - sizeof header) / sizeof(uint32_t));
  std::memcpy(table.data(), packed.data() + sizeof header, packed.size() - sizeof header);
  Extent extent = make_extent(std::move(file), static_cast<Codec>(header.codec), header.nbytes,
                              header.offset, table.data(), table.size() / 3);
  extent.generation = header.generation;
  return extent;
}

}  // namespace tiered_mem
