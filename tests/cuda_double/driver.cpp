// CUDA's driver API over the machine: what csrc/cuda_driver.h lists, and what tests call besides.
#include <cstring>
#include <string>

#include "machine.h"

using namespace cuda_double;

// A function of the API begins by asking whether it may.
#define ENTER(name) \
  if (const CUresult result = machine().enter(#name)) return result
#define ENTER_WITHOUT_CONTEXT(name) \
  if (const CUresult result = machine().enter(#name, false)) return result

namespace {

std::byte* at(CUdeviceptr address) { return reinterpret_cast<std::byte*>(address); }
std::byte* at(const void* address) { return static_cast<std::byte*>(const_cast<void*>(address)); }

bool is_device(CUdevice device) { return device >= 0 && device < machine().setting("num_devices"); }

struct Text {
  CUresult code;
  const char *name, *text;
};
const Text kTexts[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the PTX needs a newer driver"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "the memory is already registered"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "the memory has not been registered"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

const Text* text_of(CUresult code) {
  for (const Text& text : kTexts)
    if (text.code == code) return &text;
  return nullptr;
}

constexpr int kNumDevices = 16;
int contexts[kNumDevices];  // their addresses are the contexts

/// What a loaded module or a function of one is to a caller.
struct Function {
  std::string name;
};

/// A fatbin, a cubin or PTX, by how it begins.
bool is_image(const void* image) {
  unsigned magic;
  std::memcpy(&magic, image, sizeof magic);
  if (magic == 0xBA55ED50u || std::memcmp(image, "\177ELF", 4) == 0) return true;
  const char* text = static_cast<const char*>(image);
  while (*text == '\n' || *text == ' ') ++text;
  return std::strncmp(text, "//", 2) == 0 || std::strncmp(text, ".version", 8) == 0;
}

CUresult copy_one(CUstream stream, std::byte* target, const std::byte* source, std::size_t nbytes,
                  Side to, Side from, bool waits) {
  if (nbytes == 0) return CUDA_SUCCESS;
  return machine().copy(stream, {{target, source, nbytes}}, to, from, waits);
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned flags) {
  if (const CUresult result = machine().enter("cuInit", false);
      result && result != CUDA_ERROR_NOT_INITIALIZED)
    return result;
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult result = machine().init()) return result;
  return machine().enter("cuInit", false);  // refuses a forked child
}
CUresult cuDriverGetVersion(int* version) {
  *version = static_cast<int>(machine().setting("driver_version"));
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** name) {
  const Text* const text = text_of(error);
  *name = text ? text->name : nullptr;
  return text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult error, const char** string) {
  const Text* const text = text_of(error);
  *string = text ? text->text : nullptr;
  return text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetCount(int* count) {
  ENTER_WITHOUT_CONTEXT(cuDeviceGetCount);
  *count = static_cast<int>(machine().setting("num_devices"));
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER_WITHOUT_CONTEXT(cuDeviceGet);
  *device = ordinal;
  return is_device(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetName(char* name, int capacity, CUdevice device) {
  ENTER_WITHOUT_CONTEXT(cuDeviceGetName);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(name, static_cast<std::size_t>(capacity), "tiered-mem double of a CUDA device");
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  ENTER_WITHOUT_CONTEXT(cuDeviceGetAttribute);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  const auto setting = [](const char* name) { return static_cast<int>(machine().setting(name)); };
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 4;
      break;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED:
      *value = setting("integrated");
      break;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
      *value = 1;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = setting("capability") / 10;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = setting("capability") % 10;
      break;
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS:
      *value = setting("pageable_access");
      break;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
      *value = 1;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;  // the double doesn't know it: teach it
  }
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(std::size_t* nbytes, CUdevice device) {
  ENTER_WITHOUT_CONTEXT(cuDeviceTotalMem);
  *nbytes = static_cast<std::size_t>(machine().setting("memory"));
  return is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetPCIBusId(char* bus_id, int capacity, CUdevice device) {
  ENTER_WITHOUT_CONTEXT(cuDeviceGetPCIBusId);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(bus_id, static_cast<std::size_t>(capacity), "0000:%02x:00.0", device + 1);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER_WITHOUT_CONTEXT(cuDevicePrimaryCtxRetain);
  if (!is_device(device) || device >= kNumDevices) return CUDA_ERROR_INVALID_DEVICE;
  *context = reinterpret_cast<CUcontext>(&contexts[device]);
  machine().add("live_contexts");
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  const CUresult result = machine().enter("cuDevicePrimaryCtxRelease", false);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (machine().count("live_contexts") == 0) return CUDA_ERROR_INVALID_CONTEXT;
  machine().add("live_contexts", -1);
  return result;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  ENTER_WITHOUT_CONTEXT(cuCtxGetCurrent);
  *context = current_context();
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  ENTER_WITHOUT_CONTEXT(cuCtxSetCurrent);
  current_context() = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize() {
  ENTER(cuCtxSynchronize);
  return machine().synchronize();
}
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER(cuCtxGetStreamPriorityRange);
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(std::size_t* free, std::size_t* total) {
  ENTER(cuMemGetInfo);
  *total = static_cast<std::size_t>(machine().setting("memory"));
  *free = *total - machine().device_nbytes();
  return CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr* address, std::size_t nbytes) {
  ENTER(cuMemAlloc);
  return machine().allocate(Kind::device, nbytes, reinterpret_cast<std::byte**>(address));
}
CUresult cuMemHostAlloc(void** host, std::size_t nbytes, unsigned) {
  ENTER(cuMemHostAlloc);
  return machine().allocate(Kind::host, nbytes, reinterpret_cast<std::byte**>(host));
}
CUresult cuMemHostRegister(void* host, std::size_t nbytes, unsigned) {
  ENTER(cuMemHostRegister);
  return machine().add_registered(at(host), nbytes);
}
// What lets go of something does so though the device has failed: what lives stays countable.
CUresult cuMemFree(CUdeviceptr address) {
  const CUresult result = machine().enter("cuMemFree");
  const CUresult freed = machine().free(Kind::device, at(address), true);
  return result ? result : freed;
}
CUresult cuMemFreeHost(void* host) {
  const CUresult result = machine().enter("cuMemFreeHost");
  const CUresult freed = machine().free(Kind::host, at(host), true);
  return result ? result : freed;
}
CUresult cuMemHostUnregister(void* host) {
  const CUresult result = machine().enter("cuMemHostUnregister");
  const CUresult freed = machine().free(Kind::registered, at(host), true);
  return result ? result : freed;
}
CUresult cuMemHostGetDevicePointer(CUdeviceptr* address, void* host, unsigned) {
  ENTER(cuMemHostGetDevicePointer);
  *address = reinterpret_cast<CUdeviceptr>(host);
  const bool known =
      machine().knows(at(host), Kind::host) || machine().knows(at(host), Kind::registered);
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, std::size_t nbytes,
                           CUstream stream) {
  ENTER(cuMemcpyHtoDAsync);
  return copy_one(stream, at(target), at(source), nbytes, Side::device, Side::host, false);
}
CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, std::size_t nbytes, CUstream stream) {
  ENTER(cuMemcpyDtoHAsync);
  return copy_one(stream, at(target), at(source), nbytes, Side::host, Side::device, false);
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, std::size_t nbytes,
                           CUstream stream) {
  ENTER(cuMemcpyDtoDAsync);
  return copy_one(stream, at(target), at(source), nbytes, Side::device, Side::device, false);
}
CUresult cuMemcpyHtoD(CUdeviceptr target, const void* source, std::size_t nbytes) {
  ENTER(cuMemcpyHtoD);
  return copy_one(nullptr, at(target), at(source), nbytes, Side::device, Side::host, true);
}
CUresult cuMemcpyDtoH(void* target, CUdeviceptr source, std::size_t nbytes) {
  ENTER(cuMemcpyDtoH);
  return copy_one(nullptr, at(target), at(source), nbytes, Side::host, Side::device, true);
}
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, std::size_t nbytes,
                         CUstream stream) {
  ENTER(cuMemsetD8Async);
  return nbytes ? machine().fill(stream, at(target), value, nbytes) : CUDA_SUCCESS;
}
CUresult cuMemcpyBatchAsync(CUdeviceptr* targets, CUdeviceptr* sources, std::size_t* nbytes,
                            std::size_t num_copies, CUmemcpyAttributes* attributes,
                            std::size_t* first_copies, std::size_t num_attributes,
                            std::size_t* failed, CUstream stream) {
  if (failed) *failed = SIZE_MAX;
  ENTER(cuMemcpyBatchAsync);
  if (!stream || num_copies == 0 || num_attributes == 0 || num_attributes > num_copies)
    return CUDA_ERROR_INVALID_VALUE;
  for (std::size_t n = 0; n < num_attributes; ++n) {
    const bool in_order = n == 0 ? first_copies[n] == 0 : first_copies[n] > first_copies[n - 1];
    // The double reads sources in the stream's order, whatever else a caller allows.
    const int order = attributes[n].srcAccessOrder;
    if (!in_order || first_copies[n] >= num_copies || order < 1 || order > 3)
      return CUDA_ERROR_INVALID_VALUE;
  }
  std::vector<Move> moves;
  for (std::size_t n = 0; n < num_copies; ++n) {
    if (nbytes[n] == 0) {
      if (failed) *failed = n;
      return CUDA_ERROR_INVALID_VALUE;
    }
    moves.push_back({at(targets[n]), at(sources[n]), nbytes[n]});
  }
  machine().add("batches");
  return machine().copy(stream, std::move(moves), Side::either, Side::either, false);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
  ENTER(cuStreamCreateWithPriority);
  return machine().create_stream(!(flags & CU_STREAM_NON_BLOCKING), stream);
}
CUresult cuStreamDestroy(CUstream stream) {
  const CUresult result = machine().enter("cuStreamDestroy");
  const CUresult destroyed = machine().destroy_stream(stream);
  return result ? result : destroyed;
}
CUresult cuStreamQuery(CUstream stream) {
  ENTER(cuStreamQuery);
  return machine().query(stream);
}
CUresult cuStreamSynchronize(CUstream stream) {
  ENTER(cuStreamSynchronize);
  return machine().synchronize(stream);
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  ENTER(cuStreamWaitEvent);
  return flags ? CUDA_ERROR_INVALID_VALUE : machine().hold(stream, event);
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  ENTER(cuEventCreate);
  return machine().create_event(flags, event);
}
CUresult cuEventDestroy(CUevent event) {
  const CUresult result = machine().enter("cuEventDestroy");
  const CUresult destroyed = machine().destroy_event(event);
  return result ? result : destroyed;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  ENTER(cuEventRecord);
  return machine().record(event, stream);
}
CUresult cuEventQuery(CUevent event) {
  ENTER(cuEventQuery);
  return machine().query(event);
}
CUresult cuEventSynchronize(CUevent event) {
  ENTER(cuEventSynchronize);
  return machine().synchronize(event);
}
CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  ENTER(cuEventElapsedTime);
  return machine().elapsed(start, end, milliseconds);
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  ENTER(cuModuleLoadData);
  if (!is_image(image)) return CUDA_ERROR_INVALID_IMAGE;
  *module = reinterpret_cast<CUmodule>(new std::vector<std::unique_ptr<Function>>);
  machine().add("live_modules");
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  const CUresult result = machine().enter("cuModuleUnload");
  delete reinterpret_cast<std::vector<std::unique_ptr<Function>>*>(module);
  machine().add("live_modules", -1);
  return result;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  ENTER(cuModuleGetFunction);
  if (!has_kernel(name)) return CUDA_ERROR_NOT_FOUND;
  auto& functions = *reinterpret_cast<std::vector<std::unique_ptr<Function>>*>(module);
  functions.push_back(std::make_unique<Function>(Function{name}));
  *function = reinterpret_cast<CUfunction>(functions.back().get());
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned,
                        CUstream stream, void** parameters, void** extra) {
  ENTER(cuLaunchKernel);
  // The project's kernels are one-dimensional, of whole warps.
  const bool fits = grid_x > 0 && block_x > 0 && block_x <= 1024 && block_x % 32 == 0;
  if (!fits || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra)
    return CUDA_ERROR_INVALID_VALUE;
  const std::string& name = reinterpret_cast<Function*>(function)->name;
  return machine().launch(stream, bind_launch(name, grid_x, block_x, parameters));
}

/// By the base name and the version of the signature, as csrc/cuda_driver.h asks.
CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version, std::uint64_t,
                             int* status) {
  *function = nullptr;
  if (status) *status = 1;  // not found
  const std::int64_t driver_version = machine().setting("driver_version");
  if (version > driver_version) return CUDA_ERROR_INVALID_VALUE;
  if (machine().misses(symbol)) return CUDA_SUCCESS;
#define FIND(name, since, needed, parameters)                         \
  if (std::strcmp(symbol, #name) == 0 && since <= driver_version) {   \
    if (status) *status = version >= since ? 0 : 2;                   \
    if (version >= since) *function = reinterpret_cast<void*>(&name); \
    return CUDA_SUCCESS;                                              \
  }
  TIERED_MEM_CUDA_FUNCTIONS(FIND)
#undef FIND
  return CUDA_SUCCESS;
}
}
