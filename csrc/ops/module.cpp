// The Python module petl_ext._C. It has no content: importing it runs the registrations of the other files.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/cpu.h"

namespace petl {
namespace {

std::string cpu_path(std::string choice) {
  STD_TORCH_CHECK(choice.empty() || cpu::choose_path(choice.c_str()),
                  "cpu_path: must be auto or one of: ", cpu::available_paths(), ", got ", choice);
  return cpu_kernels().path;
}

std::string cpu_paths() { return cpu::available_paths(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(petl_ext, m) {
  m.def("cpu_path(str choice) -> str");
  m.def("cpu_paths() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_path", TORCH_BOX(&cpu_path));
  m.impl("cpu_paths", TORCH_BOX(&cpu_paths));
}

}  // namespace petl

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
