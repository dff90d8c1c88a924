// What the tests of the emulator share.
#pragma once
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "faults/product.h"

namespace emulator_test {

inline int checked = 0, failed = 0;

inline void expect(bool good, const std::string& what) {
  ++checked;
  failed += !good;
  if (!good) std::printf("failed: %s\n", what.c_str());
}

template <class... Parameters, class... Arguments>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(int blocks, int cluster, int threads, int shared_bytes, void (*kernel)(Parameters...),
                           Arguments... arguments) {
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {{static_cast<unsigned>(cluster), 1, 1}}};
  cudaLaunchConfig_t config;
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// What is wrong with the kernel that `run` launches; empty if nothing is.
inline std::string complaint(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Small integers, of which products and sums are exact in every format.
inline std::vector<float> small_integers(size_t count) {
  static std::mt19937 random(1);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 17) - 8);
  return values;
}

using Pack = uint32_t (*)(float, float);

inline std::vector<uint16_t> packed(const std::vector<float>& values, Pack pack) {
  std::vector<uint16_t> bits;
  for (const float value : values) bits.push_back(static_cast<uint16_t>(pack(value, 0)));
  return bits;
}

}  // namespace emulator_test
