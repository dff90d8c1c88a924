// Prompt diffusion: scores = act(x keys^T), gate = rowmax(scores), out = exp(log_scale) (y + gate (scores prompts)).
#pragma once
#include "kernels/tensor.h"

namespace petl {

enum class Activation { relu, softmax };

struct AptSizes {
  int64_t R, D, P;  // rows, width, prompts
};

struct AptForward {
  AptSizes size;
  Activation activation;
  ConstRows x;          // [R, D]
  ConstRows y;          // [R, D]
  ConstRows prompts;    // [P, D]
  ConstRows keys;       // [P, D]
  ConstRows log_scale;  // [1, 1]
  Rows out;             // [R, D]
  float* gate;          // [R]
  float* scores;        // [R, P], or null: not kept
};

struct AptBackward {
  AptSizes size;
  Activation activation;
  ConstRows dout;       // [R, D]
  ConstRows x;          // [R, D]
  ConstRows y;          // [R, D]; read only for dlog_scale
  ConstRows prompts;    // [P, D]
  ConstRows keys;       // [P, D]
  ConstRows log_scale;  // [1, 1]
  const float* gate;    // [R]
  const float* scores;  // [R, P]
  // A gradient whose data is null is not computed.
  Rows dx;            // [R, D]
  Rows dy;            // [R, D]
  float* dprompts;    // [P, D]
  float* dkeys;       // [P, D]
  float* dlog_scale;  // [1]
};

}  // namespace petl
