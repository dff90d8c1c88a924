// Prompt diffusion: scores = act(x keys^T), gate = rowmax(scores), out = exp(log_scale) (y + gate (scores prompts)).
// Dropout multiplies the scores before all else reads them.
#pragma once
#include "kernels/dropout.h"
#include "kernels/tensor.h"

namespace petl {

enum class Activation { relu, softmax };

struct AptSizes {
  int64_t R, D, P;  // rows, width, prompts

  // The width of a row of kept scores: whole 16-byte words, so that every row is aligned.
  int64_t kept() const { return (P + 7) / 8 * 8; }
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
  Rows scores;          // [R, kept], bfloat16 or float32, before dropout, zeros beyond P; null: not kept
  Dropout dropout = {};
  bool rounds_x = false;  // products are in bfloat16 though x is wider, where the processor has them
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
  ConstRows scores;     // [R, kept]
  // A gradient whose data is null is not computed.
  Rows dx;            // [R, D]
  Rows dy;            // [R, D]
  float* dprompts;    // [P, D]
  float* dkeys;       // [P, D]
  float* dlog_scale;  // [1]
  Dropout dropout = {};
  bool rounds_x = false;  // products are in bfloat16 though x is wider, where the processor has them
};

}  // namespace petl
