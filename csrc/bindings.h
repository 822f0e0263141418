// What the binding files share. They alone see Python: the GIL, buffers, exceptions.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "key.h"

namespace tiered_mem {

namespace py = pybind11;

/// Whether this is Python's main thread, which alone handles signals and ends the interpreter.
bool in_main_thread();
bool interpreter_is_ending();

/// Gives the GIL up for its lifetime. A daemon thread that comes back when the interpreter is gone
/// stops here: taking the GIL would end the thread through C++ frames, and so the process.
class NoGil {
 public:
  NoGil() = default;
  ~NoGil();
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

/// Holds the GIL for its lifetime, with the same care.
class Gil {
 public:
  Gil();

 private:
  py::gil_scoped_acquire acquired_;
};

/// A call into Python that may run long, from under a lock: nobody stops in it. False where the
/// interpreter's end has begun and this isn't its main thread: then Python isn't called any more.
class PluginCall {
 public:
  PluginCall();
  ~PluginCall();
  PluginCall(const PluginCall&) = delete;
  PluginCall& operator=(const PluginCall&) = delete;
  explicit operator bool() const { return gil_.has_value(); }

 private:
  std::optional<py::gil_scoped_acquire> gil_;
};

/// A class of tiered_mem.errors. Imported when needed: loading the extension mustn't load it.
py::object error_class(const char* name);
/// Python's exception for an error of the core, made but not raised.
py::object as_exception(const std::exception_ptr& error);

using KeyArray = py::array_t<Key, py::array::c_style | py::array::forcecast>;

inline std::vector<Key> to_vector(const KeyArray& keys) {
  return std::vector<Key>(keys.data(), keys.data() + keys.size());
}

void bind_bounds(py::module_& m);
void bind_device(py::module_& m);
void bind_policy(py::module_& m);
void bind_queue(py::module_& m);
void bind_replay(py::module_& m);
void bind_residency(py::module_& m);
void bind_runtime(py::module_& m);
void bind_store(py::module_& m);

}  // namespace tiered_mem
