// Python's view of devices.
#include <cstdint>
#include <string>
#include <tuple>

#include "bindings.h"
#include "cuda_driver.h"
#include "device.h"
#include "device_cuda.h"
#include "error.h"

namespace tiered_mem {

namespace {

using Released = py::call_guard<NoGil>;
using namespace py::literals;

// Python holds neither constants nor what it can't name, so marks and pins come in a box. A mark
// that is reached from the start is None.
struct MarkBox {
  MarkPtr mark;
};
struct PinBox {
  std::shared_ptr<void> pin;
};

MarkPtr unboxed(const MarkBox* box) { return box == nullptr ? nullptr : box->mark; }
std::optional<MarkBox> boxed(MarkPtr mark) {
  if (mark == nullptr) return std::nullopt;
  return MarkBox{std::move(mark)};
}

std::byte* at(std::uint64_t address) { return reinterpret_cast<std::byte*>(address); }

using CopyArray = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

std::optional<MarkBox> copy(Device& device, const std::string& direction, const CopyArray& copies,
                            const std::vector<const MarkBox*>& after) {
  if (copies.size() != 0 && (copies.ndim() != 2 || copies.shape(1) != 3))
    throw ConfigError("copies must be [count, 3]: target, source, nbytes");
  std::vector<Copy> batch;
  for (py::ssize_t i = 0; i < copies.size() / 3; ++i)
    batch.push_back({at(copies.at(i, 0)), at(copies.at(i, 1)), copies.at(i, 2)});
  std::vector<MarkPtr> marks;
  for (const MarkBox* box : after) marks.push_back(unboxed(box));
  const Direction where = direction_of(direction);
  NoGil release;
  return boxed(device.copy_async(where, batch, marks));
}

void bind_base(py::module_& m) {
  py::class_<MarkBox>(m, "Mark", "A point in a device's work.");
  py::class_<PinBox>(m, "Pin", "Keeps host memory page-locked while it lives.")
      .def("release", [](PinBox& box) { box.pin.reset(); }, Released(), "End it now.");

  py::class_<Device, std::shared_ptr<Device>>(m, "Device", "What copies between tiers' memories.")
      .def_property_readonly("host_accessible", &Device::host_accessible,
                             "Whether its memory is host memory.")
      .def_property_readonly("asynchronous", &Device::asynchronous,
                             "Whether `copy` returns before the bytes have arrived.")
      .def_property_readonly("stream_ordered", &Device::stream_ordered,
                             "Whether computing waits for copies by itself.")
      .def("allocate", &Device::allocate, py::arg("nbytes"), Released(), "Memory for a tier.")
      .def("allocate_staging", &Device::allocate_staging, py::arg("nbytes"), Released(),
           "Host memory that copies reach without a detour.")
      .def("copy", &copy, py::arg("direction"), py::arg("copies"),
           py::arg("after") = std::vector<const MarkBox*>(),
           "Start a batch of copies behind the marks in `after`.")
      .def(
          "reached",
          [](Device& device, const MarkBox* mark) { return device.reached(unboxed(mark)); },
          py::arg("mark"), Released(), "Whether it is reached; doesn't wait.")
      .def(
          "wait", [](Device& device, const MarkBox* mark) { device.wait(unboxed(mark)); },
          py::arg("mark"), Released())
      .def(
          "mark_compute",
          [](Device& device, Compute compute) { return boxed(device.mark_compute(compute)); },
          py::arg("compute") = 0, Released(), "A point behind all that was given to `compute`.")
      .def(
          "hold_compute",
          [](Device& device, Compute compute, const MarkBox* mark) {
            device.hold_compute(compute, unboxed(mark));
          },
          py::arg("compute"), py::arg("mark"), Released(),
          "Let what is given to `compute` from now on come after a mark.")
      .def(
          "reaches",
          [](const Device& device, std::uint64_t address, std::uint64_t nbytes) {
            return device.reaches(at(address), nbytes);
          },
          py::arg("address"), py::arg("nbytes"), Released(),
          "Whether copies from and to this host memory need no staging.")
      .def(
          "pin",
          [](Device& device, std::uint64_t address, std::uint64_t nbytes) {
            return PinBox{device.pin(at(address), nbytes)};
          },
          py::arg("address"), py::arg("nbytes"), Released(), "Page-lock a range of host memory.");
}

// --- CUDA ---

constexpr int kCalibrationVersion = 1;

// Plain, so that it can be kept as JSON.
py::dict calibrate(CudaDevice& device) {
  cuda::Calibration found;
  {
    NoGil release;
    found = device.calibrate();
  }
  py::list times;
  for (const CopyTime& time : found.times)
    times.append(py::make_tuple(name_of(time.direction), name_of(time.method), time.nbytes,
                                time.num_copies, time.seconds));
  return py::dict("version"_a = kCalibrationVersion, "times"_a = times,
                  "in_bytes_per_second"_a = found.in_bytes_per_second,
                  "duplex_bytes_per_second"_a = found.duplex_bytes_per_second);
}

void set_calibration(CudaDevice& device, const py::dict& table) {
  using Row = std::tuple<std::string, std::string, std::uint64_t, std::uint64_t, double>;
  std::vector<CopyTime> times;
  try {
    if (table["version"].cast<int>() != kCalibrationVersion)
      throw ConfigError("a calibration of another version; measure again by calibrate()");
    for (const auto& [direction, method, nbytes, num_copies, seconds] :
         table["times"].cast<std::vector<Row>>())
      times.push_back(
          {direction_of(direction), copy_method_of(method), nbytes, num_copies, seconds});
  } catch (const py::error_already_set&) {  // a key that isn't there
    throw ConfigError("not a calibration: it lacks version or times; measure again by calibrate()");
  } catch (const py::cast_error&) {
    throw ConfigError(
        "not a calibration: times must have rows of direction, method, nbytes, "
        "num_copies, seconds; measure again by calibrate()");
  }
  NoGil release;
  device.set_calibration(times);
}

void launch(CudaDevice& device, const std::string& kernel, const cuda::Kernels::Extent& grid,
            const cuda::Kernels::Extent& block, const std::vector<std::uint64_t>& arguments,
            Compute compute) {
  NoGil release;
  device.launch(kernel, grid, block, arguments, compute);
}

void bind_cuda(py::module_& m) {
  m.def(
      "cuda_driver_version",
      []() -> std::optional<int> {
        const int version = cuda::installed_driver_version();
        if (version == 0) return std::nullopt;
        return version;
      },
      Released(), "CUDA's version in the driver, 12080 for 12.8; None without a driver.");
  m.def("cuda_device_count", &cuda::num_devices, Released(),
        "How many CUDA devices this process sees; 0 without a driver.");

  py::class_<CudaDevice, Device, std::shared_ptr<CudaDevice>>(m, "CudaDevice",
                                                              "A device of NVIDIA's.")
      .def(py::init([](int ordinal, const std::string& copy_method) {
             NoGil release;
             return std::make_shared<CudaDevice>(CudaConfig{ordinal, copy_method});
           }),
           py::arg("ordinal") = 0, py::arg("copy_method") = "auto")
      .def_property_readonly("name", &CudaDevice::name)
      .def_property_readonly("driver_version", &CudaDevice::driver_version)
      .def_property_readonly("compute_capability", &CudaDevice::compute_capability)
      .def_property_readonly("integrated", &CudaDevice::integrated,
                             "Whether it shares its memory with the CPU.")
      .def_property_readonly("pci_bus_id", &CudaDevice::pci_bus_id)
      .def("memory", &CudaDevice::memory, Released(), "Bytes of device memory: (free, total).")
      .def(
          "load_kernels",
          [](CudaDevice& device, const py::bytes& image) {
            const std::string bytes = image;
            NoGil release;
            device.load_kernels(bytes);
          },
          py::arg("image"), "Load a cubin, a fatbin or PTX made of csrc/kernels.cu.")
      .def("launch", &launch, py::arg("kernel"), py::arg("grid"), py::arg("block"),
           py::arg("arguments"), py::arg("compute") = 0, "Queue a loaded kernel.")
      .def("calibrate", &calibrate, "Measure all ways of copying; takes about a second.")
      .def("set_calibration", &set_calibration, py::arg("table"),
           "Choose ways of copying by a table of `calibrate`.")
      .def(
          "copy_method",
          [](const CudaDevice& device, const std::string& direction, std::uint64_t nbytes,
             std::uint64_t num_copies) {
            return name_of(device.method_for(direction_of(direction), nbytes, num_copies));
          },
          py::arg("direction"), py::arg("nbytes"), py::arg("num_copies"),
          "How so many blocks of so many bytes would be copied.");
}

}  // namespace

void bind_device(py::module_& m) {
  bind_base(m);
  m.def("host_device", [] { return std::shared_ptr<Device>(make_host_device()); });
  bind_cuda(m);
  bind_queue(m);
}

}  // namespace tiered_mem
