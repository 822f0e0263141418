#include "cuda_kernels.h"

namespace tiered_mem::cuda {

Kernels::~Kernels() {
  if (context_->forked()) return;
  const Current current(*context_);
  for (CUmodule module : modules_) context_->api().cuModuleUnload(module);
}

void Kernels::load(const std::string& image) {
  if (image.empty())
    throw DeviceError("the kernel image is empty; build csrc/kernels.cu by nvcc, or install CuPy");
  const Driver& api = context_->api();
  CUmodule module = nullptr;
  CUresult result = api.cuModuleLoadData(&module, image.c_str());
  if (result != CUDA_SUCCESS)
    throw DeviceError("the kernel image can't be loaded: " + api.text(result) +
                      "; it must be built for this device's compute capability and by a CUDA no "
                      "newer than the driver's");
  CUfunction copy = nullptr;
  result = api.cuModuleGetFunction(&copy, module, kCopyKernel);
  if (result != CUDA_SUCCESS) {
    api.cuModuleUnload(module);
    throw DeviceError(std::string("the kernel image has no ") + kCopyKernel + ": " +
                      api.text(result) + "; build it from this version's csrc/kernels.cu");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  modules_.push_back(module);
  copy_kernel_ = copy;
}

CUfunction Kernels::find(const std::string& name) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (modules_.empty())
    throw DeviceError("no kernel image is loaded: give one to load_kernels before launching " +
                      name);
  CUfunction function = nullptr;
  context_->api().check(
      context_->api().cuModuleGetFunction(&function, modules_.back(), name.c_str()),
      "the kernel image has no " + name + " that can be used");
  return function;
}

void Kernels::launch(CUfunction function, const Extent& grid, const Extent& block,
                     std::vector<std::uint64_t> arguments, CUstream stream) const {
  std::vector<void*> parameters;
  for (std::uint64_t& argument : arguments) parameters.push_back(&argument);
  const CUresult result =
      context_->api().cuLaunchKernel(function, grid[0], grid[1], grid[2], block[0], block[1],
                                     block[2], 0, stream, parameters.data(), nullptr);
  if (result != CUDA_SUCCESS)
    throw TransferError("a CUDA kernel can't be launched: " + context_->api().text(result));
}

}  // namespace tiered_mem::cuda
