// The Python module: errors, the GIL, and the parts that the other binding files add.
#include "bindings.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

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

// At the interpreter's end a thread other than the main one that waits for the GIL, or runs Python,
// is ended there: through C++ frames, which ends the process. So the end waits for those that are
// about to take it, and whoever comes later stops before.
std::atomic<int> num_taking{0};
std::atomic<bool> end_has_begun{false};

bool too_late() { return (end_has_begun || interpreter_is_ending()) && !in_main_thread(); }

class Taking {
 public:
  Taking() {
    ++num_taking;
    if (!too_late()) return;
    --num_taking;
    for (;;) pause();
  }
  ~Taking() { --num_taking; }
};

void begin_end() {
  end_has_begun = true;
  const NoGil released;
  for (int i = 0; i < 2000 && num_taking > 0; ++i)  // one that hangs is left alone
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

NoGil::~NoGil() {
  const Taking taking;
  PyEval_RestoreThread(state_);
}

Gil::Gil() : acquired_((Taking(), py::gil_scoped_acquire())) {}

PluginCall::PluginCall() {
  ++num_taking;
  if (!too_late()) gil_.emplace();
}

PluginCall::~PluginCall() {
  gil_.reset();
  --num_taking;
}

namespace {

// The class of tiered_mem.errors that stands for an error of the core.
const char* error_name(const Error& error) {
  if (dynamic_cast<const IoError*>(&error)) return "TransferError";
  if (dynamic_cast<const TransferError*>(&error)) return "TransferError";
  if (dynamic_cast<const DeviceError*>(&error)) return "DeviceError";
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
  // What is registered first runs last: after all that others do at the end.
  py::module_::import("atexit").attr("register")(py::cpp_function(&begin_end));
  bind_errors(m);
  bind_bounds(m);
  bind_store(m);
  bind_policy(m);
  bind_residency(m);
  bind_replay(m);
  bind_device(m);
  bind_runtime(m);
}
