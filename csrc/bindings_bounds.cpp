// Bounds in Python: traces whose future is known.
#include "bindings.h"
#include "bounds.h"
#include "error.h"

namespace tiered_mem {

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::vector<T> copy(const Array<T>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

Future make_future(const Array<std::int64_t>& offsets, const Array<std::uint32_t>& blocks,
                   const Array<std::uint64_t>& sizes) {
  return Future(copy(offsets), copy(blocks), copy(sizes));
}

Array<std::uint64_t> missing_by_belady(const Future& future, std::uint64_t capacity,
                                       std::uint64_t pinned_nbytes, bool divisible) {
  std::vector<std::uint64_t> missing;
  {
    const NoGil release;
    missing = belady(future, capacity, {pinned_nbytes, divisible});
  }
  return Array<std::uint64_t>(static_cast<py::ssize_t>(missing.size()), missing.data());
}

double seconds_at_least(const Future& future, std::uint64_t capacity, std::uint64_t pinned_nbytes,
                        double bytes_per_second, double latency, const Array<double>& work) {
  const std::vector<double> seconds = copy(work);
  if (seconds.size() != future.num_events()) throw ConfigError("work is not one time an event");
  const NoGil release;
  return least_seconds(future, capacity, pinned_nbytes, {bytes_per_second, latency}, seconds);
}

}  // namespace

void bind_bounds(py::module_& m) {
  py::class_<Future>(m, "Future")
      .def(py::init(&make_future), py::arg("offsets"), py::arg("blocks"), py::arg("sizes"));
  m.def("belady", &missing_by_belady, py::arg("future"), py::kw_only(), py::arg("capacity"),
        py::arg("pinned_nbytes"), py::arg("divisible"));
  m.def("least_seconds", &seconds_at_least, py::arg("future"), py::kw_only(), py::arg("capacity"),
        py::arg("pinned_nbytes"), py::arg("bytes_per_second"), py::arg("latency"), py::arg("work"));
}

}  // namespace tiered_mem
