// The Python module petl_ext._C. It has no content: importing it runs the registrations of the other files.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/cpu.h"
#ifdef PETL_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace petl {
namespace {

std::string cpu_path(std::string choice) {
  PETL_REQUIRE(choice.empty() || cpu::choose_path(choice.c_str()),
               "cpu_path: must be auto or one of: ", cpu::available_paths(), ", got ", choice);
  return cpu_kernels().path;
}

std::string cpu_paths() { return cpu::available_paths(); }

// Whether this build has CUDA kernels, and the torch that runs it has streams to put them into.
bool has_cuda_stream() {
#ifdef PETL_WITH_CUDA
  return aoti_torch_get_current_cuda_stream != nullptr;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(petl_ext, m) {
  m.def("cpu_path(str choice) -> str");
  m.def("cpu_paths() -> str");
  m.def("has_cuda_stream() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_path", TORCH_BOX(&cpu_path));
  m.impl("cpu_paths", TORCH_BOX(&cpu_paths));
  m.impl("has_cuda_stream", TORCH_BOX(&has_cuda_stream));
}

}  // namespace petl

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
