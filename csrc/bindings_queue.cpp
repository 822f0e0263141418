// Python's side of a device whose copies are made by threads of Python's:
// `tiered_mem.device.portable`.
#include "bindings.h"
#include "device_queue.h"

namespace tiered_mem {

namespace {

using Released = py::call_guard<NoGil>;

std::uint64_t address_of(const std::byte* data) { return reinterpret_cast<std::uintptr_t>(data); }

// None once the device is closed.
py::object take(QueueDevice& device, Direction direction) {
  std::vector<QueueDevice::Command> commands;
  {
    NoGil release;
    commands = device.take(direction);
  }
  if (commands.empty()) return py::none();
  py::list result;
  for (const QueueDevice::Command& command : commands) {
    py::list copies;
    for (const Copy& copy : command.copies)
      copies.append(py::make_tuple(address_of(copy.target), address_of(copy.source), copy.nbytes));
    result.append(py::make_tuple(command.id, copies, py::cast(command.points)));
  }
  return result;
}

void add_pinned(QueueDevice& device, std::uint64_t address, std::uint64_t nbytes,
                const py::object& owner) {
  const std::shared_ptr<void> kept(new py::object(owner), [](void* held) {
    const Gil gil;
    delete static_cast<py::object*>(held);
  });
  NoGil release;
  device.add_pinned(reinterpret_cast<std::byte*>(address), nbytes, kept);
}

}  // namespace

void bind_queue(py::module_& m) {
  py::class_<QueueDevice, Device, std::shared_ptr<QueueDevice>>(
      m, "QueueDevice", "A device whose copies are made by whoever takes its commands.")
      .def(py::init<>())
      .def("add_pinned", &add_pinned, py::arg("address"), py::arg("nbytes"), py::arg("owner"))
      .def("take_in", [](QueueDevice& device) { return take(device, Direction::in); })
      .def("take_out", [](QueueDevice& device) { return take(device, Direction::out); })
      .def("complete", &QueueDevice::complete, py::arg("id"), Released())
      .def("fail", &QueueDevice::fail, py::arg("id"), py::arg("message"), Released())
      .def("take_forgotten", &QueueDevice::take_forgotten, Released())
      .def("close", &QueueDevice::close, py::arg("message"), Released());
}

}  // namespace tiered_mem
