// Dropout as a raw op is asked for it.
#pragma once
#include "kernels/dropout.h"
#include "ops/check.h"

namespace petl {

// `seeds` must live until the kernel has read them.
template <class Device>
Dropout dropout_of(const Device& device, const char* op, double probability, const std::optional<Tensor>& seeds) {
  PETL_REQUIRE(probability >= 0 && probability < 1, op, ": dropout must lie in [0, 1), got ", probability);
  if (probability == 0) return {nullptr, 0, 1};
  PETL_REQUIRE(seeds, op, ": seeds must be given where dropout is above 0");
  const Argument argument{op, "seeds", *seeds};
  PETL_REQUIRE(
      seeds->scalar_type() == ScalarType::Long && seeds->dim() == 1 && seeds->size(0) == 2 && seeds->is_contiguous(),
      op, ": seeds must be int64 with shape [2], got ", torch::headeronly::toString(seeds->scalar_type()), " with ",
      shape_text(seeds->sizes()));
  device.holds(argument);
  return {static_cast<const int64_t*>(seeds->const_data_ptr()), static_cast<uint32_t>(probability * 0x1p32),
          static_cast<float>(1 / (1 - probability))};
}

}  // namespace petl
