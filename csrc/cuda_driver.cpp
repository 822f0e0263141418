#include "cuda_driver.h"

#include <dlfcn.h>

#include <cstdlib>

#include "process.h"

namespace tiered_mem::cuda {

namespace {

using GetProcAddress = CUresult (*)(const char* name, void** function, int version,
                                    std::uint64_t flags, int* status);
constexpr std::uint64_t kLegacyDefaultStream = 1;  // torch's default stream is the legacy one

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string library_path() {
  const char* named = std::getenv("TIERED_MEM_CUDA_DRIVER");
  return named != nullptr && *named != '\0' ? named : "libcuda.so.1";
}

// A library that holds the driver, kept open: it has threads and state of its own.
struct Library {
  std::string path = library_path();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  std::string error = handle == nullptr ? dlerror() : "";
  int version = 0;

  Library() {
    const auto get_version = symbol<CUresult (*)(int*)>("cuDriverGetVersion");
    if (get_version == nullptr || get_version(&version) != CUDA_SUCCESS) version = 0;
  }

  template <typename Function>
  Function symbol(const char* name) const {
    return handle == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(handle, name));
  }
};

const Library& library() {
  static const Library library;
  return library;
}

template <typename Function>
void look_up(GetProcAddress get, const char* name, int version, bool needed, Function& function) {
  void* address = nullptr;
  int status = 0;
  if (get(name, &address, version, kLegacyDefaultStream, &status) != CUDA_SUCCESS)
    address = nullptr;
  function = reinterpret_cast<Function>(address);
  if (needed && function == nullptr)
    throw DeviceError("the CUDA driver " + library().path + " has no " + name +
                      "; install NVIDIA's driver anew");
}

// Serves as what every process finds; a child that was forked later sees its parent's.
struct Loaded {
  Driver driver;
  std::string error;  // why there is none
  bool no_device = false;
  unsigned generation = process_generation();

  Loaded() {
    try {
      load();
    } catch (const DeviceError& failed) {
      error = failed.what();
    }
  }

  void load() {
    const Library& found = library();
    if (found.handle == nullptr)
      throw DeviceError("no CUDA driver: " + found.error +
                        "; install NVIDIA's driver, or run on device=\"cpu\"");
    const auto get = found.symbol<GetProcAddress>("cuGetProcAddress_v2");
    if (get == nullptr || found.version < kMinDriverVersion)
      throw DeviceError("the CUDA driver " + found.path + " serves CUDA " +
                        version_text(found.version) + ", but " + version_text(kMinDriverVersion) +
                        " is needed; update NVIDIA's driver to 525 or newer");
    driver.version = found.version;
    driver.path = found.path;
#define TIERED_MEM_LOOK_UP(name, version, needed, parameters) \
  look_up(get, #name, version, needed, driver.name);
    TIERED_MEM_CUDA_FUNCTIONS(TIERED_MEM_LOOK_UP)
#undef TIERED_MEM_LOOK_UP
    const CUresult result = driver.cuInit(0);
    no_device = result == CUDA_ERROR_NO_DEVICE;
    if (result != CUDA_SUCCESS)
      throw DeviceError("the CUDA driver " + found.path +
                        " can't be initialised: " + driver.text(result) +
                        "; see whether nvidia-smi works, and use no CUDA after a fork");
  }
};

const Loaded& loaded() {
  static const Loaded loaded;
  return loaded;
}

}  // namespace

std::string Driver::text(CUresult result) const {
  const char* name = nullptr;
  const char* words = nullptr;
  if (cuGetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr)
    return "CUDA error " + std::to_string(result);
  if (cuGetErrorString(result, &words) != CUDA_SUCCESS || words == nullptr) return name;
  return std::string(name) + " (" + words + ")";
}

void Driver::check(CUresult result, const std::string& what) const {
  if (result != CUDA_SUCCESS) throw DeviceError(what + ": " + text(result));
}

const Driver& driver() {
  const Loaded& found = loaded();
  if (!found.error.empty()) throw DeviceError(found.error);
  if (found.generation != process_generation())
    throw DeviceError(
        "CUDA can't be used in a forked child; start the process by multiprocessing's \"spawn\"");
  return found.driver;
}

int installed_driver_version() { return library().version; }

int num_devices() {
  if (library().handle == nullptr || loaded().no_device) return 0;
  int count = 0;
  driver().check(driver().cuDeviceGetCount(&count), "can't count the CUDA devices");
  return count;
}

}  // namespace tiered_mem::cuda
