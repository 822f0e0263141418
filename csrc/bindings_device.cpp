// Python's view of devices.
#include "bindings.h"
#include "device.h"

namespace tiered_mem {

void bind_device(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device", "What copies between tiers' memories.")
      .def_property_readonly("host_accessible", &Device::host_accessible,
                             "Whether its memory is host memory.")
      .def_property_readonly("asynchronous", &Device::asynchronous)
      .def_property_readonly("stream_ordered", &Device::stream_ordered,
                             "Whether computing waits for copies by itself.");
  m.def("host_device", [] { return std::shared_ptr<Device>(make_host_device()); });
  bind_queue(m);
}

}  // namespace tiered_mem
