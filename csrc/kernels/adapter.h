// The bottleneck adapter: out = residual + scale * (act(norm(x) down^T + down_bias) up^T + up_bias), where norm is
// LayerNorm or nothing, and residual may be absent. Dropout multiplies what act returns.
#pragma once
#include "kernels/dropout.h"
#include "kernels/tensor.h"

namespace petl {

enum class AdapterActivation { relu, gelu, silu };

struct AdapterSizes {
  int64_t R, D, B;  // rows, width, bottleneck
};

// What forward and backward share.
struct AdapterInputs {
  AdapterSizes size;
  AdapterActivation activation;
  ConstRows x;            // [R, D]
  ConstRows norm_weight;  // [1, D]; null: x is not normalized
  ConstRows norm_bias;    // [1, D]
  ConstRows down;         // [B, D]
  ConstRows down_bias;    // [1, B]
  ConstRows up;           // [D, B]
  ConstRows up_bias;      // [1, D]
  ConstRows gain;         // [1, 1], a trained factor; null: 1
  float scale;            // scale * gain multiplies what is added
  float epsilon;          // of the normalization
  Dropout dropout = {};
  bool rounds_x = false;  // products are in bfloat16 though x is wider, where the processor has them
};

struct AdapterForward {
  AdapterInputs inputs;
  ConstRows residual;  // [R, D]; null: none
  Rows out;            // [R, D], in the dtype of the residual if there is one
  Rows raw = {};       // [R, B], what backward can take: (norm(x) - norm_bias) down^T, or without a norm x down^T +
                       // down_bias; null: not kept
};

struct AdapterBackward {
  AdapterInputs inputs;
  ConstRows dout;          // [R, D], in the dtype of out
  bool residual_is_input;  // dx gains dout
  // A gradient whose data is null is not computed. Those of the weights are computed all or none.
  Rows dx;              // [R, D]
  float* dnorm_weight;  // [D]; null also where x is not normalized
  float* dnorm_bias;    // [D]
  float* ddown;         // [B, D]
  float* ddown_bias;    // [B]
  float* dup;           // [D, B]
  float* dup_bias;      // [D]
  float* dgain;         // [1]
  ConstRows raw = {};   // [R, B], what forward has kept; null: it is computed again
};

}  // namespace petl
