#include "device_cuda.h"

#include <algorithm>

namespace tiered_mem {

using cuda::Current;

namespace {

cuda::CUstream stream_of(Compute compute) { return reinterpret_cast<cuda::CUstream>(compute); }

std::optional<CopyMethod> forced_method(const std::string& name) {
  if (name == "auto") return std::nullopt;
  const CopyMethod method = copy_method_of(name);
  if (method == CopyMethod::batch && cuda::driver().cuMemcpyBatchAsync == nullptr)
    throw DeviceError(
        "copy_method=\"batch\" needs a driver of CUDA 12.8 or newer; update it, or use \"auto\"");
  return method;
}

}  // namespace

CudaDevice::CudaDevice(const CudaConfig& config)
    : context_(std::make_shared<const cuda::Context>(config.ordinal)),
      events_(std::make_shared<cuda::Events>(context_)),
      kernels_(std::make_shared<cuda::Kernels>(context_)),
      ranges_(std::make_shared<PinnedRanges>()),
      integrated_(context_->attribute(cuda::CU_DEVICE_ATTRIBUTE_INTEGRATED) != 0),
      host_(make_host_device()),
      forced_method_(forced_method(config.copy_method)),
      methods_(std::make_shared<const CopyMethods>()) {
  const Current current(*context_);
  in_ = std::make_unique<cuda::Lane>(Direction::in, context_, events_, kernels_);
  out_ = std::make_unique<cuda::Lane>(Direction::out, context_, events_, kernels_);
}

// --- memory ---

std::shared_ptr<Memory> CudaDevice::allocate(std::uint64_t nbytes) {
  if (!integrated_)
    throw DeviceError("memory of a CUDA device comes in segments: add them to the tiers instead");
  return allocate_staging(nbytes);
}

std::shared_ptr<Memory> CudaDevice::allocate_staging(std::uint64_t nbytes) {
  return cuda::allocate_pinned(context_, ranges_, nbytes);
}

bool CudaDevice::reaches(const std::byte* host, std::uint64_t nbytes) const {
  return integrated_ || ranges_->cover(host, nbytes);
}

std::shared_ptr<void> CudaDevice::pin(std::byte* host, std::uint64_t nbytes) {
  if (integrated_ || nbytes == 0) return nullptr;
  return cuda::pin(context_, ranges_, host, nbytes);
}

// --- copies ---

MarkPtr CudaDevice::copy_async(Direction direction, const std::vector<Copy>& copies,
                               const std::vector<MarkPtr>& after) {
  const Current current(*context_);
  if (integrated_) {
    copy_on_host(copies, after);
    return nullptr;
  }
  const std::vector<Piece> pieces = ranges_->cut(direction, join_neighbours(direction, copies));
  if (pieces.empty() && after.empty()) return nullptr;
  std::uint64_t nbytes = 0;
  for (const Piece& piece : pieces) nbytes += piece.nbytes;
  const std::uint64_t count = std::max<std::uint64_t>(pieces.size(), 1);
  const CopyMethod method = method_for(direction, nbytes / count, count);
  return (direction == Direction::in ? in_ : out_)->copy(method, pieces, after);
}

void CudaDevice::copy_on_host(const std::vector<Copy>& copies, const std::vector<MarkPtr>& after) {
  for (const MarkPtr& mark : after) events_->wait(mark);
  host_->copy_async(Direction::in, copies, {});
}

CopyMethodSet CudaDevice::available() const {
  return {true, context_->api().cuMemcpyBatchAsync != nullptr, kernels_->copy_kernel() != nullptr};
}

CopyMethod CudaDevice::method_for(Direction direction, std::uint64_t nbytes,
                                  std::uint64_t num_copies) const {
  if (forced_method_) return *forced_method_;
  return std::atomic_load(&methods_)->choose(direction, nbytes, num_copies, available());
}

cuda::Calibration CudaDevice::calibrate() {
  if (integrated_)
    throw DeviceError("this device shares its memory with the CPU: there are no copies to measure");
  const Current current(*context_);
  return cuda::calibrate(context_, *events_, *in_, *out_, available());
}

void CudaDevice::set_calibration(const std::vector<CopyTime>& times) {
  std::atomic_store(&methods_, std::make_shared<const CopyMethods>(times));
}

// --- marks ---

bool CudaDevice::reached(const MarkPtr& mark) {
  const Current current(*context_);
  return events_->reached(mark);
}

void CudaDevice::wait(const MarkPtr& mark) {
  const Current current(*context_);
  events_->wait(mark);
}

MarkPtr CudaDevice::mark_compute(Compute compute) {
  const Current current(*context_);
  return events_->record(stream_of(compute));
}

void CudaDevice::hold_compute(Compute compute, const MarkPtr& mark) {
  const Current current(*context_);
  events_->hold(stream_of(compute), mark);
}

// --- kernels ---

void CudaDevice::load_kernels(const std::string& image) {
  const Current current(*context_);
  kernels_->load(image);
}

void CudaDevice::launch(const std::string& kernel, const cuda::Kernels::Extent& grid,
                        const cuda::Kernels::Extent& block,
                        const std::vector<std::uint64_t>& arguments, Compute compute) {
  const Current current(*context_);
  kernels_->launch(kernels_->find(kernel), grid, block, arguments, stream_of(compute));
}

// --- what it is ---

std::string CudaDevice::name() const {
  const Current current(*context_);
  char text[256] = "";
  context_->api().check(context_->api().cuDeviceGetName(text, sizeof text, context_->device()),
                        "can't read the CUDA device's name");
  return text;
}

std::string CudaDevice::pci_bus_id() const {
  const Current current(*context_);
  char text[32] = "";
  context_->api().check(context_->api().cuDeviceGetPCIBusId(text, sizeof text, context_->device()),
                        "can't read the CUDA device's bus id");
  return text;
}

std::pair<int, int> CudaDevice::compute_capability() const {
  const Current current(*context_);
  return {context_->attribute(cuda::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
          context_->attribute(cuda::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)};
}

std::pair<std::uint64_t, std::uint64_t> CudaDevice::memory() const {
  const Current current(*context_);
  std::size_t free = 0;
  std::size_t total = 0;
  context_->api().check(context_->api().cuMemGetInfo(&free, &total),
                        "can't read how much device memory is free");
  return {free, total};
}

}  // namespace tiered_mem
