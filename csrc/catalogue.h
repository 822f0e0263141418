#pragma once

#include <memory>
#include <string_view>

#include "direct_io.h"

namespace tiered_mem {

// Reads a catalogue entry as tiered_mem/catalogue.py packs it under `key`.
// Throws ChecksumMismatch if it is damaged or another key's, StoreError if it makes no sense.
Extent parse_entry(std::shared_ptr<File> file, std::string_view key, std::string_view packed);

}  // namespace tiered_mem
