#include "cuda_lane.h"

#include <algorithm>
#include <cstdio>

namespace tiered_mem::cuda {

namespace {

constexpr std::size_t kBlocksPerLaunch = 4096;
// 16384 threads with 16 bytes each hold more than any link's bandwidth times its latency, and leave
// most multiprocessors to what computes.
constexpr Kernels::Extent kCopyGrid = {32, 1, 1};
constexpr Kernels::Extent kCopyThreads = {512, 1, 1};

std::string hex(std::uint64_t address) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

std::uint64_t address(const Piece& piece) { return reinterpret_cast<std::uint64_t>(piece.host); }

}  // namespace

Lane::Lane(Direction direction, std::shared_ptr<const Context> context,
           std::shared_ptr<Events> events, std::shared_ptr<const Kernels> kernels)
    : direction_(direction),
      context_(std::move(context)),
      events_(std::move(events)),
      kernels_(std::move(kernels)) {
  const Driver& api = context_->api();
  int least = 0;
  int greatest = 0;
  api.check(api.cuCtxGetStreamPriorityRange(&least, &greatest), "can't read stream priorities");
  api.check(api.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, greatest),
            "can't make a CUDA stream");
}

// Waits for nothing, for a transfer may never end: the driver destroys the stream when it is done.
Lane::~Lane() {
  if (context_->forked()) return;
  const Current current(*context_);
  for (const Descriptors& each : descriptors_)
    if (ended(each)) context_->api().cuMemFreeHost(each.blocks);
  context_->api().cuStreamDestroy(stream_);
}

// Whether the launch that reads them has ended; on a device that failed, nothing ends.
bool Lane::ended(const Descriptors& descriptors) const {
  try {
    return events_->reached(descriptors.last_use);
  } catch (const TransferError&) {
    return false;
  }
}

MarkPtr Lane::copy(CopyMethod method, const std::vector<Piece>& pieces,
                   const std::vector<MarkPtr>& after) {
  std::vector<Piece> pinned;
  std::vector<Piece> pageable;
  for (const Piece& piece : pieces)
    (method != CopyMethod::engine && piece.host_on_device != 0 ? pinned : pageable)
        .push_back(piece);

  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Descriptors*> used;
  try {
    for (const MarkPtr& mark : after) events_->hold(stream_, mark);
    copy_by_engine(pageable);
    if (method == CopyMethod::batch) copy_by_batch(pinned);
    if (method == CopyMethod::kernel) copy_by_kernel(pinned, used);
    const MarkPtr mark = events_->record(stream_);
    for (Descriptors* each : used) each->last_use = mark;
    return mark;
  } catch (...) {
    // The caller takes its buffers back, so what was told before must have ended.
    context_->api().cuStreamSynchronize(stream_);
    throw;
  }
}

void Lane::copy_by_engine(const std::vector<Piece>& pieces) {
  const Driver& api = context_->api();
  for (const Piece& piece : pieces) {
    if (direction_ == Direction::in) {
      const CUresult result =
          api.cuMemcpyHtoDAsync(piece.device, piece.host, piece.nbytes, stream_);
      if (result != CUDA_SUCCESS) fail(result, "cuMemcpyHtoDAsync", piece);
    } else {
      const CUresult result =
          api.cuMemcpyDtoHAsync(piece.host, piece.device, piece.nbytes, stream_);
      if (result != CUDA_SUCCESS) fail(result, "cuMemcpyDtoHAsync", piece);
    }
  }
}

void Lane::copy_by_batch(const std::vector<Piece>& pieces) {
  if (pieces.empty()) return;
  const Driver& api = context_->api();
  if (api.cuMemcpyBatchAsync == nullptr)
    throw DeviceError(
        "this driver has no batched copies, which came with CUDA 12.8; update it, or "
        "use copy_method=\"auto\"");
  std::vector<CUdeviceptr> targets;
  std::vector<CUdeviceptr> sources;
  std::vector<std::size_t> sizes;
  for (const Piece& piece : pieces) {
    targets.push_back(direction_ == Direction::in ? piece.device : address(piece));
    sources.push_back(direction_ == Direction::in ? address(piece) : piece.device);
    sizes.push_back(piece.nbytes);
  }
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  std::size_t first = 0;
  std::size_t failed = 0;
  const CUresult result =
      api.cuMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), sizes.size(),
                             &attributes, &first, 1, &failed, stream_);
  // Where no single copy is to blame, the number is SIZE_MAX.
  if (result != CUDA_SUCCESS)
    fail(result, "cuMemcpyBatchAsync", pieces[std::min(failed, pieces.size() - 1)]);
}

void Lane::copy_by_kernel(const std::vector<Piece>& pieces, std::vector<Descriptors*>& used) {
  if (pieces.empty()) return;
  CUfunction kernel = kernels_->copy_kernel();
  if (kernel == nullptr)
    throw DeviceError(
        "copy_method=\"kernel\" needs a kernel image, and none is loaded; build "
        "csrc/kernels.cu by nvcc or install CuPy, or use copy_method=\"auto\"");
  for (std::size_t begin = 0; begin < pieces.size(); begin += kBlocksPerLaunch) {
    const std::size_t count = std::min(kBlocksPerLaunch, pieces.size() - begin);
    Descriptors& descriptors = idle_descriptors(used);
    used.push_back(&descriptors);
    for (std::size_t i = 0; i < count; ++i) {
      const Piece& piece = pieces[begin + i];
      const bool in = direction_ == Direction::in;
      descriptors.blocks[i] = {in ? piece.device : piece.host_on_device,
                               in ? piece.host_on_device : piece.device, piece.nbytes};
    }
    try {
      kernels_->launch(kernel, kCopyGrid, kCopyThreads,
                       {reinterpret_cast<std::uint64_t>(descriptors.blocks), count}, stream_);
    } catch (const TransferError& error) {
      throw TransferError(std::string("copying ") + std::to_string(count) + " blocks " +
                          name_of(direction_) + ": " + error.what());
    }
  }
}

Lane::Descriptors& Lane::idle_descriptors(const std::vector<Descriptors*>& used) {
  for (Descriptors& each : descriptors_)
    if (std::find(used.begin(), used.end(), &each) == used.end() && ended(each)) return each;
  void* host = nullptr;
  const CUresult result = context_->api().cuMemHostAlloc(
      &host, kBlocksPerLaunch * sizeof(CopyBlock), CU_MEMHOSTALLOC_PORTABLE);
  if (result != CUDA_SUCCESS)
    throw TransferError("no pinned memory for a copy kernel's list of blocks: " +
                        context_->api().text(result));
  descriptors_.push_back({static_cast<CopyBlock*>(host), nullptr});
  return descriptors_.back();
}

void Lane::fail(CUresult result, const char* function, const Piece& piece) const {
  const bool in = direction_ == Direction::in;
  throw TransferError(std::string(function) + " failed: " + context_->api().text(result) +
                      "; direction " + name_of(direction_) + ", " + std::to_string(piece.nbytes) +
                      " bytes from " + hex(in ? address(piece) : piece.device) + " to " +
                      hex(in ? piece.device : address(piece)));
}

}  // namespace tiered_mem::cuda
