// Attention with one query per head, shared by all tokens of a sample, and keys and values that are the tokens
// themselves: weights = softmax over the tokens of scale * (visual query^T), pooled = weights^T visual.
#pragma once
#include "kernels/tensor.h"

namespace petl {

struct AttentionPoolSizes {
  int64_t B, N, D, H;  // samples, tokens, width, heads
};

// What forward and backward share.
struct AttentionPoolInputs {
  AttentionPoolSizes size;
  ConstRows visual;       // [B, N, D]: the rows of one sample, and
  int64_t visual_sample;  // so many elements further on those of the next
  ConstRows query;        // [B * H, D]
  const uint8_t* mask;    // [B, N], 0: the token takes no part, and its row is not read; null: all do
  float scale;
};

struct AttentionPoolForward {
  AttentionPoolInputs inputs;
  Rows pooled;        // [B * H, D], in the dtype of visual
  float* statistics;  // [2, B * H]: the greatest of a head's scores, and the sum of exp(score - greatest)
};

struct AttentionPoolBackward {
  AttentionPoolInputs inputs;
  ConstRows dpooled;        // [B * H, D]
  ConstRows pooled;         // [B * H, D], as forward wrote it
  const float* statistics;  // the same
  // A gradient whose data is null is not computed.
  Rows dvisual;   // [B, N, D], zero where a token takes no part
  float* dquery;  // [B * H, D]
};

}  // namespace petl
