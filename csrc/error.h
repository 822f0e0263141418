// Exceptions of the core. Each stands for one class of tiered_mem.errors; bindings.cpp translates.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tiered_mem {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ConfigError : Error {
  using Error::Error;
};
struct BudgetError : Error {
  using Error::Error;
};
struct EventTooLarge : Error {
  using Error::Error;
};
// A plug-in raised, or answered what can't be.
struct PolicyError : Error {
  using Error::Error;
};
struct RuntimeClosed : Error {
  using Error::Error;
};
struct StoreError : Error {
  using Error::Error;
};

// A device, its driver or a kernel image that can't be used.
struct DeviceError : Error {
  using Error::Error;
};
// A copy that failed. TransferError in Python.
struct TransferError : Error {
  using Error::Error;
};

// The device or the file reported an error, or ended early. Translated to TransferError.
struct IoError : Error {
  IoError(int error_number, const std::string& path, uint64_t offset, const std::string& what)
      : Error(what + " " + path + " at byte " + std::to_string(offset) + ": " +
              (error_number ? std::strerror(error_number) : "the file ends before these bytes")),
        error_number(error_number) {}
  int error_number;  // 0: the file was too short
};

// Stored bytes that don't match their checksum. Translated to ChecksumError.
struct ChecksumMismatch : Error {
  using Error::Error;
  ChecksumMismatch(const std::string& path, uint64_t offset)
      : Error("checksum mismatch in " + path + " at byte " + std::to_string(offset) +
              ": the stored bytes are damaged, or were rewritten after their snapshot ended") {}
};

}  // namespace tiered_mem
