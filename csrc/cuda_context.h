// A CUDA device's context, and the points in its work that marks stand for.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "device.h"
#include "process.h"

namespace tiered_mem::cuda {

/// A device's primary context, which is torch's own, retained as long as anyone uses it.
class Context {
 public:
  /// Throws DeviceError if there is no such device.
  explicit Context(int ordinal);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Driver& api() const { return api_; }
  CUdevice device() const { return device_; }
  CUcontext handle() const { return handle_; }
  /// Whether this is a child of the process that made it: nothing of CUDA works there, so nothing
  /// is given back either.
  bool forked() const { return generation_ != process_generation(); }
  int attribute(int attribute) const;

 private:
  const Driver& api_;
  CUdevice device_ = 0;
  CUcontext handle_ = nullptr;
  unsigned generation_ = process_generation();
};

/// Makes a context current in the calling thread for its lifetime: I/O threads have none, and a
/// caller may compute on another device. Throws RuntimeClosed in a forked child.
class Current {
 public:
  explicit Current(const Context& context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Context& context_;
  CUcontext previous_ = nullptr;
};

/// The events behind marks. They return here when their mark is gone, to be recorded anew: what was
/// told to wait for one waits for what it stood for then. Safe to share between threads.
class Events : public std::enable_shared_from_this<Events> {
 public:
  explicit Events(std::shared_ptr<const Context> context) : context_(std::move(context)) {}
  ~Events();
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  // All need the context to be current, take marks of this device only, and throw TransferError.

  /// A mark behind all that was given to `stream`.
  MarkPtr record(CUstream stream);
  /// What is given to `stream` from now on comes after the mark.
  void hold(CUstream stream, const MarkPtr& mark);
  bool reached(const MarkPtr& mark);
  void wait(const MarkPtr& mark);

 private:
  class CudaMark;

  CUevent take();
  void put(CUevent event);
  bool settle(const MarkPtr& mark, CUresult result);

  const std::shared_ptr<const Context> context_;
  std::mutex mutex_;
  std::vector<CUevent> idle_;
};

}  // namespace tiered_mem::cuda
