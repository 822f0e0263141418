// CUDA's driver API, found at run time: one build serves machines with and without a GPU.
//
// Nothing of the toolkit is needed to build this. The types below are those of cuda.h, declared
// anew because the API fixes their layout. kvikio finds the driver in the same way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "error.h"

namespace tiered_mem::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = std::uint64_t;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;

struct CUmemLocation {
  int type;
  int id;
};

struct CUmemcpyAttributes {
  int srcAccessOrder;
  CUmemLocation srcLocHint;
  CUmemLocation dstLocHint;
  unsigned flags;
};

// Results that are told apart. cuGetErrorName names the others.
constexpr CUresult CUDA_SUCCESS = 0;
constexpr CUresult CUDA_ERROR_INVALID_VALUE = 1;
constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
constexpr CUresult CUDA_ERROR_NO_DEVICE = 100;
constexpr CUresult CUDA_ERROR_INVALID_DEVICE = 101;
constexpr CUresult CUDA_ERROR_INVALID_IMAGE = 200;
constexpr CUresult CUDA_ERROR_NO_BINARY_FOR_GPU = 209;
constexpr CUresult CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222;
constexpr CUresult CUDA_ERROR_NOT_FOUND = 500;
constexpr CUresult CUDA_ERROR_NOT_READY = 600;
constexpr CUresult CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712;
constexpr CUresult CUDA_ERROR_NOT_SUPPORTED = 801;

// Of cuDeviceGetAttribute.
constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
constexpr int CU_DEVICE_ATTRIBUTE_INTEGRATED = 18;
constexpr int CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY = 19;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS = 88;
constexpr int CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91;

constexpr unsigned CU_MEMHOSTALLOC_PORTABLE = 1;
constexpr unsigned CU_MEMHOSTREGISTER_PORTABLE = 1;
constexpr unsigned CU_MEMHOSTREGISTER_DEVICEMAP = 2;
constexpr unsigned CU_STREAM_NON_BLOCKING = 1;
constexpr unsigned CU_EVENT_BLOCKING_SYNC = 1;
constexpr unsigned CU_EVENT_DISABLE_TIMING = 2;
constexpr int CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1;

// The oldest CUDA that is served, as cuDriverGetVersion counts.
constexpr int kMinDriverVersion = 12000;

// Every function that is used: X(name, version of its signature, needed, parameters). They are
// asked of cuGetProcAddress_v2 by these names and versions, which alone is looked up as a symbol,
// with cuDriverGetVersion for drivers that don't have it. One that isn't needed is null where the
// driver has none.
#define TIERED_MEM_CUDA_FUNCTIONS(X)                                                             \
  X(cuInit, 2000, true, (unsigned flags))                                                        \
  X(cuDriverGetVersion, 2020, true, (int* version))                                              \
  X(cuGetErrorName, 6000, true, (CUresult error, const char** name))                             \
  X(cuGetErrorString, 6000, true, (CUresult error, const char** text))                           \
  X(cuDeviceGetCount, 2000, true, (int* count))                                                  \
  X(cuDeviceGet, 2000, true, (CUdevice * device, int ordinal))                                   \
  X(cuDeviceGetName, 2000, true, (char* name, int capacity, CUdevice device))                    \
  X(cuDeviceGetAttribute, 2000, true, (int* value, int attribute, CUdevice device))              \
  X(cuDeviceTotalMem, 3020, true, (std::size_t* nbytes, CUdevice device))                        \
  X(cuDeviceGetPCIBusId, 4010, true, (char* bus_id, int capacity, CUdevice device))              \
  X(cuDevicePrimaryCtxRetain, 7000, true, (CUcontext * context, CUdevice device))                \
  X(cuDevicePrimaryCtxRelease, 11000, true, (CUdevice device))                                   \
  X(cuCtxGetCurrent, 4000, true, (CUcontext * context))                                          \
  X(cuCtxSetCurrent, 4000, true, (CUcontext context))                                            \
  X(cuCtxGetStreamPriorityRange, 5050, true, (int* least, int* greatest))                        \
  X(cuMemGetInfo, 3020, true, (std::size_t* free, std::size_t* total))                           \
  X(cuMemAlloc, 3020, true, (CUdeviceptr * address, std::size_t nbytes))                         \
  X(cuMemFree, 3020, true, (CUdeviceptr address))                                                \
  X(cuMemHostAlloc, 2020, true, (void** host, std::size_t nbytes, unsigned flags))               \
  X(cuMemFreeHost, 2000, true, (void* host))                                                     \
  X(cuMemHostRegister, 6050, true, (void* host, std::size_t nbytes, unsigned flags))             \
  X(cuMemHostUnregister, 4000, true, (void* host))                                               \
  X(cuMemHostGetDevicePointer, 3020, true, (CUdeviceptr * address, void* host, unsigned flags))  \
  X(cuMemcpyHtoDAsync, 3020, true,                                                               \
    (CUdeviceptr target, const void* source, std::size_t nbytes, CUstream stream))               \
  X(cuMemcpyDtoHAsync, 3020, true,                                                               \
    (void* target, CUdeviceptr source, std::size_t nbytes, CUstream stream))                     \
  X(cuMemcpyBatchAsync, 12080, false,                                                            \
    (CUdeviceptr * targets, CUdeviceptr * sources, std::size_t* nbytes, std::size_t num_copies,  \
     CUmemcpyAttributes* attributes, std::size_t* first_copies, std::size_t num_attributes,      \
     std::size_t* failed, CUstream stream))                                                      \
  X(cuStreamCreateWithPriority, 5050, true, (CUstream * stream, unsigned flags, int priority))   \
  X(cuStreamDestroy, 4000, true, (CUstream stream))                                              \
  X(cuStreamSynchronize, 2000, true, (CUstream stream))                                          \
  X(cuStreamWaitEvent, 3020, true, (CUstream stream, CUevent event, unsigned flags))             \
  X(cuEventCreate, 2000, true, (CUevent * event, unsigned flags))                                \
  X(cuEventDestroy, 4000, true, (CUevent event))                                                 \
  X(cuEventRecord, 2000, true, (CUevent event, CUstream stream))                                 \
  X(cuEventQuery, 2000, true, (CUevent event))                                                   \
  X(cuEventSynchronize, 2000, true, (CUevent event))                                             \
  X(cuEventElapsedTime, 2000, true, (float* milliseconds, CUevent start, CUevent end))           \
  X(cuModuleLoadData, 2000, true, (CUmodule * module, const void* image))                        \
  X(cuModuleUnload, 2000, true, (CUmodule module))                                               \
  X(cuModuleGetFunction, 2000, true, (CUfunction * function, CUmodule module, const char* name)) \
  X(cuLaunchKernel, 4000, true,                                                                  \
    (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,   \
     unsigned block_y, unsigned block_z, unsigned shared_nbytes, CUstream stream,                \
     void** parameters, void** extra))

/// The driver's functions, by their names in cuda.h.
struct Driver {
#define TIERED_MEM_DECLARE(name, version, needed, parameters) CUresult(*name) parameters = nullptr;
  TIERED_MEM_CUDA_FUNCTIONS(TIERED_MEM_DECLARE)
#undef TIERED_MEM_DECLARE

  int version = 0;  // 12080 is CUDA 12.8
  std::string path;

  /// CUDA's name and text for a result.
  std::string text(CUresult result) const;
  /// Throws DeviceError for anything but success: "`what`: CUDA's name and text".
  void check(CUresult result, const std::string& what) const;
};

/// The driver, loaded and initialised by the first call. The environment's TIERED_MEM_CUDA_DRIVER
/// names another library than libcuda.so.1. Throws DeviceError where there is none, where it is
/// older than `kMinDriverVersion`, where it can't be initialised, and in a forked child.
const Driver& driver();

/// The driver's CUDA version, 0 where no driver is installed. Initialises nothing.
int installed_driver_version();

/// 0 where there is no driver or no device. Throws DeviceError as `driver` does.
int num_devices();

}  // namespace tiered_mem::cuda
