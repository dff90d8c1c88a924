// The adapter's activations and their derivatives.
#pragma once
#include <type_traits>

#include "kernels/adapter.h"
#include "kernels/cuda/ptx.h"

namespace petl::cuda {

struct ActivationValue {
  float value, derivative;
};

// GELU and SiLU share an exponential and a reciprocal: code that is inlined for every sum of a thread has to be short.
// erf is Abramowitz and Stegun's 7.1.26, whose error is at most 1.5e-7, that of a few additions in float32.
template <AdapterActivation kActivation>
__device__ __forceinline__ ActivationValue activate(float x) {
  // Comparisons written so that a NaN stays one.
  if constexpr (kActivation == AdapterActivation::relu) return {max_or_nan(x, 0), x <= 0 ? 0.0f : x == x ? 1.0f : x};
  constexpr bool kGelu = kActivation == AdapterActivation::gelu;
  const float magnitude = fabsf(x);
  const float exponential = expf(kGelu ? -0.5f * x * x : -magnitude);
  const float inverse = __fdividef(1, 1 + (kGelu ? 0.23164190f * magnitude : exponential));
  // The share of the distribution, normal or logistic, beyond |x|.
  const float polynomial =
      inverse *
      (0.127414796f +
       inverse * (-0.142248368f + inverse * (0.710706871f + inverse * (-0.726576013f + inverse * 0.530702714f))));
  const float beyond = exponential * (kGelu ? polynomial : inverse);
  const float share = x < 0 ? beyond : 1 - beyond;
  const float density = kGelu ? 0.39894228f * exponential : share * (1 - share);
  return {x * share, share + x * density};
}

// Calls function with the activation as a constant: chosen inside of unrolled loops it would cost more than the
// activations do.
template <class Function>
__device__ __forceinline__ void with_activation(AdapterActivation activation, const Function& function) {
  switch (activation) {
    case AdapterActivation::relu:
      return function(std::integral_constant<AdapterActivation, AdapterActivation::relu>());
    case AdapterActivation::gelu:
      return function(std::integral_constant<AdapterActivation, AdapterActivation::gelu>());
    default:
      return function(std::integral_constant<AdapterActivation, AdapterActivation::silu>());
  }
}

}  // namespace petl::cuda
