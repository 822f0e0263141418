// The Python module: errors, the GIL, and the parts that the other binding files add.
#include "bindings.h"

#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"

namespace tiered_mem {

bool in_main_thread() { return syscall(SYS_gettid) == getpid(); }

bool interpreter_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

namespace {

void stop_if_ending() {
  while (interpreter_is_ending() && !in_main_thread()) pause();
}

}  // namespace

NoGil::~NoGil() {
  stop_if_ending();
  PyEval_RestoreThread(state_);
}

Gil::Gil() : acquired_((stop_if_ending(), py::gil_scoped_acquire())) {}

namespace {

// The class of tiered_mem.errors that stands for an error of the core.
const char* error_name(const Error& error) {
  if (dynamic_cast<const IoError*>(&error)) return "TransferError";
  if (dynamic_cast<const ChecksumMismatch*>(&error)) return "ChecksumError";
  if (dynamic_cast<const StoreError*>(&error)) return "StoreError";
  if (dynamic_cast<const RuntimeClosed*>(&error)) return "RuntimeClosedError";
  if (dynamic_cast<const EventTooLarge*>(&error)) return "EventTooLargeError";
  if (dynamic_cast<const BudgetError*>(&error)) return "BudgetError";
  if (dynamic_cast<const PolicyError*>(&error)) return "PolicyError";
  if (dynamic_cast<const ConfigError*>(&error)) return "ConfigError";
  return "TieredMemError";
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

}  // namespace

py::object error_class(const char* name) {
  return py::module_::import("tiered_mem.errors").attr(name);
}

py::object as_exception(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& known) {
    return error_class(error_name(known))(known.what());
  } catch (const std::exception& other) {
    return error_class("TransferError")(other.what());
  }
}

}  // namespace tiered_mem

PYBIND11_MODULE(_core, m) {
  using namespace tiered_mem;
  m.doc() = "The core of tiered-mem in C++.";
  bind_errors(m);
  bind_bounds(m);
  bind_store(m);
  bind_policy(m);
  bind_residency(m);
  bind_replay(m);
  bind_runtime(m);
}
