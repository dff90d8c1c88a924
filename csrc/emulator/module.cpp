// The Python module petl_emulated. Importing it registers torch ops that run the CUDA kernels on the CPU: the
// registrations are those of csrc/ops.
#include <pybind11/pybind11.h>

#include "emulator/settings.h"
#include "kernels/cuda/hopper.h"

namespace py = pybind11;

namespace {

void configure(const std::string& order, const std::string& copies, unsigned threads, size_t shared_memory_limit) {
  emulator::configure({emulator::order_named(order), emulator::copies_named(copies), threads, shared_memory_limit});
}

py::dict settings() {
  const emulator::Settings settings = emulator::settings();
  using namespace py::literals;
  return py::dict("order"_a = emulator::name_of(settings.order), "copies"_a = emulator::name_of(settings.copies),
                  "threads"_a = settings.threads, "shared_memory_limit"_a = settings.shared_memory_limit);
}

}  // namespace

PYBIND11_MODULE(petl_emulated, module) {
  const emulator::Settings defaults;
  module.def("configure", &configure, py::kw_only(), py::arg("order") = emulator::name_of(defaults.order),
             py::arg("copies") = emulator::name_of(defaults.copies), py::arg("threads") = defaults.threads,
             py::arg("shared_memory_limit") = defaults.shared_memory_limit,
             "How kernels run from now on: order forward or reverse, copies lazy or eager, on how many threads (0: one "
             "per core), with how many bytes of shared memory per block.");
  module.def("choose_hopper", &petl::cuda::choose_hopper, py::arg("value"),
             "As PETL_HOPPER says it when the process begins.");
  module.def("settings", &settings, "What configure set, by name.");
}
