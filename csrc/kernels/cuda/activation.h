// The adapter's activations and their derivatives.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/ptx.h"

namespace petl::cuda {

struct ActivationValue {
  float value, derivative;
};

// GELU and SiLU share an exponential and a reciprocal: code that is inlined for every sum of a thread has to be short.
// erf is Abramowitz and Stegun's 7.1.26, whose error is at most 1.5e-7, that of a few additions in float32.
__device__ __forceinline__ ActivationValue activate(AdapterActivation activation, float x) {
  // Comparisons written so that a NaN stays one.
  if (activation == AdapterActivation::relu) return {x < 0 ? 0 : x, x <= 0 ? 0.0f : x == x ? 1.0f : x};
  const bool gelu = activation == AdapterActivation::gelu;
  const float magnitude = fabsf(x);
  const float exponential = expf(gelu ? -0.5f * x * x : -magnitude);
  const float inverse = __fdividef(1, 1 + (gelu ? 0.23164190f * magnitude : exponential));
  // The share of the distribution, normal or logistic, beyond |x|.
  const float polynomial =
      inverse *
      (0.127414796f +
       inverse * (-0.142248368f + inverse * (0.710706871f + inverse * (-0.726576013f + inverse * 0.530702714f))));
  const float beyond = exponential * (gelu ? polynomial : inverse);
  const float share = x < 0 ? beyond : 1 - beyond;
  const float density = gelu ? 0.39894228f * exponential : share * (1 - share);
  return {x * share, share + x * density};
}

}  // namespace petl::cuda
