#include "cuda_context.h"

#include <chrono>
#include <thread>

namespace tiered_mem::cuda {

// --- context ---

Context::Context(int ordinal) : api_(driver()) {
  const int count = num_devices();
  if (ordinal < 0 || ordinal >= count)
    throw DeviceError("there is no CUDA device " + std::to_string(ordinal) +
                      ": this process sees " + std::to_string(count) +
                      "; choose another, or see CUDA_VISIBLE_DEVICES");
  const std::string name = "CUDA device " + std::to_string(ordinal);
  api_.check(api_.cuDeviceGet(&device_, ordinal), "can't open " + name);
  api_.check(api_.cuDevicePrimaryCtxRetain(&handle_, device_), "can't use " + name);
}

Context::~Context() {
  if (!forked()) api_.cuDevicePrimaryCtxRelease(device_);
}

int Context::attribute(int attribute) const {
  int value = 0;
  api_.check(api_.cuDeviceGetAttribute(&value, attribute, device_),
             "can't read attribute " + std::to_string(attribute) + " of the CUDA device");
  return value;
}

// A context that can't be made current makes the calls after it fail, which report it.
Current::Current(const Context& context) : context_(context) {
  if (context.forked())
    throw RuntimeClosed(
        "a CUDA device can't be used in a forked child; start the process by multiprocessing's "
        "\"spawn\"");
  context.api().cuCtxGetCurrent(&previous_);
  if (previous_ != context.handle()) context.api().cuCtxSetCurrent(context.handle());
}

Current::~Current() {
  if (previous_ != context_.handle()) context_.api().cuCtxSetCurrent(previous_);
}

// --- events ---

class Events::CudaMark final : public Mark {
 public:
  CudaMark(std::shared_ptr<Events> owner, CUevent event)
      : owner_(std::move(owner)), event_(event) {}
  ~CudaMark() override { owner_->put(event_); }
  CudaMark(const CudaMark&) = delete;
  CudaMark& operator=(const CudaMark&) = delete;

  static const CudaMark& of(const MarkPtr& mark) { return static_cast<const CudaMark&>(*mark); }
  CUevent event() const { return event_; }
  bool reached() const { return reached_; }
  void set_reached() const { reached_ = true; }

 private:
  const std::shared_ptr<Events> owner_;
  const CUevent event_;
  mutable std::atomic<bool> reached_{false};  // saves asking the driver again
};

Events::~Events() {
  if (context_->forked()) return;
  const Current current(*context_);
  for (CUevent event : idle_) context_->api().cuEventDestroy(event);
}

CUevent Events::take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      CUevent event = idle_.back();
      idle_.pop_back();
      return event;
    }
  }
  CUevent event = nullptr;
  const CUresult result =
      context_->api().cuEventCreate(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC);
  if (result != CUDA_SUCCESS)
    throw TransferError("can't make a CUDA event: " + context_->api().text(result));
  return event;
}

void Events::put(CUevent event) {
  if (context_->forked()) return;  // the lock may be held by a thread that isn't there
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(event);
}

MarkPtr Events::record(CUstream stream) {
  const auto mark = std::make_shared<const CudaMark>(shared_from_this(), take());
  const CUresult result = context_->api().cuEventRecord(mark->event(), stream);
  if (result != CUDA_SUCCESS)
    throw TransferError("can't mark a point in a CUDA stream: " + context_->api().text(result));
  return mark;
}

void Events::hold(CUstream stream, const MarkPtr& mark) {
  if (mark == nullptr || CudaMark::of(mark).reached()) return;
  const CUresult result = context_->api().cuStreamWaitEvent(stream, CudaMark::of(mark).event(), 0);
  if (result != CUDA_SUCCESS)
    throw TransferError("can't make a CUDA stream wait: " + context_->api().text(result));
}

// Whether the mark is reached, by what the driver said of its event.
bool Events::settle(const MarkPtr& mark, CUresult result) {
  if (result == CUDA_ERROR_NOT_READY) return false;
  if (result != CUDA_SUCCESS)
    throw TransferError("the CUDA device failed in the work before a mark: " +
                        context_->api().text(result) + "; this process can't use it any more");
  CudaMark::of(mark).set_reached();
  return true;
}

bool Events::reached(const MarkPtr& mark) {
  if (mark == nullptr || CudaMark::of(mark).reached()) return true;
  return settle(mark, context_->api().cuEventQuery(CudaMark::of(mark).event()));
}

// What ends soon is polled for: waking a sleeping thread takes longer than copying a chunk.
void Events::wait(const MarkPtr& mark) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::microseconds(50);
  while (!reached(mark)) {
    if (Clock::now() > end) {
      settle(mark, context_->api().cuEventSynchronize(CudaMark::of(mark).event()));
      return;
    }
    std::this_thread::yield();
  }
}

}  // namespace tiered_mem::cuda
