// The adapter's activations and their derivatives.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/ptx.h"

namespace petl::cuda {

struct ActivationValue {
  float value, derivative;
};

__device__ __forceinline__ ActivationValue activate(AdapterActivation activation, float x) {
  // Comparisons written so that a NaN stays one.
  if (activation == AdapterActivation::relu) return {x < 0 ? 0 : x, x <= 0 ? 0.0f : x == x ? 1.0f : x};
  if (activation == AdapterActivation::gelu) {
    const float below = 0.5f * (1 + erff(x * 0.70710678f));  // the normal distribution's share below x
    const float density = 0.39894228f * expf(-0.5f * x * x);
    return {x * below, below + x * density};
  }
  const float sigmoid = 1 / (1 + expf(-x));
  return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
}

}  // namespace petl::cuda
