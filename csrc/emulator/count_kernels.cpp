// Runs one op on random tensors and writes, as a line of JSON for each launch, what it asked of the machine:
//
//     count_kernels <op> <forward|backward> <bfloat16|float32> <rows or samples> <width> <inner size> <tokens>
//                   [sampled|hopper]
//
// Activations are bfloat16; the dtype is that of the weights. Tokens are attention pooling's. With `sampled` only the
// first block of each launch and its neighbors, the middle one and the last run, and what backward needs of forward is
// made up, so products that are not wanted cannot be told. With `hopper` the Hopper path computes, of backward the rows
// alone, and all blocks run: since each goes on to other rows, none stands for the others. bench/counts.py and
// bench/hopper_counts.py read this.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/counts.h"
#include "emulator/settings.h"
#include "kernels/cuda/adapter.h"
#include "kernels/cuda/adapter_hopper.h"
#include "kernels/cuda/apt.h"
#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/attention_pool.h"
#include "kernels/cuda/hopper_layout.h"
#include "kernels/cuda/layer_norm.h"

int main(int count, char** arguments);

namespace {

namespace counts = emulator::counts;
using petl::ConstRows;
using petl::DType;

constexpr petl::cuda::Queue kQueue{0, nullptr};
constexpr size_t kAlignment = 256;  // as torch's allocator gives

struct Case {
  std::string op, direction;
  DType weights;
  int64_t rows, D, inner, tokens;
  bool sampled, by_hopper;

  bool is_backward() const { return direction == "backward"; }
  bool runs_forward() const { return !is_backward() || !(sampled || by_hopper); }
};

size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Device memory; its pages exist once they are touched.
class Tensors {
 public:
  // Uninitialized.
  void* make(const std::string& name, int64_t count, DType dtype) {
    const size_t bytes = static_cast<size_t>(count) * size_of(dtype);
    void* memory = allocate(bytes);
    counts::name_memory(name, memory, bytes);
    return memory;
  }
  float* floats(const std::string& name, int64_t count) {
    return static_cast<float*>(make(name, count, DType::float32));
  }
  // Of rows that hold normal numbers; the same ones come back after a while, which no kernel notices.
  void* normal(const std::string& name, int64_t count, DType dtype, float deviation) {
    void* memory = make(name, count, dtype);
    const std::vector<char> some = normal_numbers(dtype, deviation);
    const size_t bytes = static_cast<size_t>(count) * size_of(dtype);
    for (size_t begin = 0; begin < bytes; begin += some.size()) {
      std::memcpy(static_cast<char*>(memory) + begin, some.data(), std::min(some.size(), bytes - begin));
    }
    return memory;
  }
  void* workspace(int64_t bytes) { return workspace("workspace", bytes); }
  void* workspace(const std::string& name, int64_t bytes) { return normal(name, bytes / 4, DType::float32, 1); }
  // In two parts, uninitialized.
  void* workspace(const std::string& first, int64_t first_bytes, const std::string& rest, int64_t bytes) {
    char* memory = static_cast<char*>(allocate(bytes));
    counts::name_memory(first, memory, first_bytes);
    counts::name_memory(rest, memory + first_bytes, bytes - first_bytes);
    return memory;
  }

 private:
  void* allocate(size_t bytes) {
    const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    all_.emplace_back(std::aligned_alloc(kAlignment, whole + kAlignment), &std::free);
    return all_.back().get();
  }

  std::vector<char> normal_numbers(DType dtype, float deviation) {
    constexpr size_t kCount = 99991;  // no multiple of a row
    std::normal_distribution<float> normal(0, deviation);
    std::vector<char> bytes(kCount * size_of(dtype));
    for (size_t i = 0; i < kCount; ++i) {
      const float value = normal(random_);
      const char* bits = reinterpret_cast<const char*>(&value);
      // The upper half of a float is a bfloat16.
      std::memcpy(&bytes[i * size_of(dtype)], bits + 4 - size_of(dtype), size_of(dtype));
    }
    return bytes;
  }

  std::mt19937 random_{1};
  std::vector<std::unique_ptr<void, void (*)(void*)>> all_;
};

constexpr DType kActivations = DType::bfloat16;

void expect_success(int error) {
  if (error) throw std::runtime_error(petl::cuda::error_text(error));
}

petl::AptForward apt_forward_of(const Case& c, Tensors& tensors) {
  petl::AptForward forward = {};
  forward.size = {c.rows, c.D, c.inner};
  const auto [R, D, P] = forward.size;
  forward.activation = petl::Activation::relu;
  forward.x = {tensors.normal("x", R * D, kActivations, 1), D, kActivations};
  forward.y = {tensors.normal("y", R * D, kActivations, 1), D, kActivations};
  forward.prompts = {tensors.normal("prompts", P * D, c.weights, 0.05f), D, c.weights};
  forward.keys = {tensors.normal("keys", P * D, c.weights, 0.05f), D, c.weights};
  forward.log_scale = {tensors.normal("log_scale", 1, c.weights, 0.1f), 1, c.weights};
  forward.gate = static_cast<float*>(tensors.normal("gate", R, DType::float32, 1));
  const int64_t kept = R * forward.size.kept();
  forward.scores = {c.is_backward() ? tensors.normal("scores", kept, kActivations, 1) : nullptr, kActivations};
  forward.out = {tensors.make("out", R * D, kActivations), kActivations};
  return forward;
}

petl::AptBackward apt_backward_of(const petl::AptForward& forward, Tensors& tensors) {
  const auto [R, D, P] = forward.size;
  petl::AptBackward args = {};
  args.size = forward.size;
  args.activation = forward.activation;
  args.dout = {tensors.normal("dout", R * D, kActivations, 1), D, kActivations};
  args.x = forward.x;
  args.y = forward.y;
  args.prompts = forward.prompts;
  args.keys = forward.keys;
  args.log_scale = forward.log_scale;
  args.gate = forward.gate;
  args.scores = {forward.scores.data, forward.size.kept(), kActivations};
  args.dx = {tensors.make("dx", R * D, kActivations), kActivations};
  args.dy = {tensors.make("dy", R * D, kActivations), kActivations};
  args.dprompts = tensors.floats("dprompts", P * D);
  args.dkeys = tensors.floats("dkeys", P * D);
  args.dlog_scale = tensors.floats("dlog_scale", 1);
  return args;
}

void run_apt(const Case& c, Tensors& tensors) {
  const petl::AptForward forward = apt_forward_of(c, tensors);
  void* packed = tensors.workspace("packed", petl::cuda::apt_packed_bytes(forward));
  void* workspace = tensors.workspace(petl::cuda::apt_forward_workspace(forward));
  if (c.runs_forward())
    expect_success(petl::cuda::apt_forward(forward, packed, petl::cuda::AptDone::nothing, workspace, kQueue));
  if (!c.is_backward()) return;
  counts::take_launches();
  const petl::AptBackward args = apt_backward_of(forward, tensors);
  workspace = tensors.workspace(petl::cuda::apt_backward_workspace(args));
  expect_success(petl::cuda::apt_backward(args, workspace, kQueue));
}

void run_hopper_apt(const Case& c, Tensors& tensors) {
  const petl::AptForward forward = apt_forward_of(c, tensors);
  if (!c.is_backward()) {
    void* packed = tensors.workspace("packed", petl::cuda::apt_hopper_packed_bytes(forward));
    expect_success(petl::cuda::apt_hopper_forward(forward, packed, false, kQueue));
    return;
  }
  const petl::AptBackward args = apt_backward_of(forward, tensors);
  const int64_t kept = c.rows * forward.size.kept();
  const petl::cuda::AptHopperKept found{
      tensors.workspace("packed", petl::cuda::apt_hopper_backward_bytes(args)),
      tensors.make("dscores", kept, kActivations), tensors.make("weighted", kept, kActivations),
      static_cast<double*>(tensors.workspace("shares", sizeof(double) * petl::cuda::apt_hopper_shares(args)))};
  expect_success(petl::cuda::apt_hopper_backward_rows(args, found, kQueue));
}

petl::AdapterInputs adapter_inputs_of(const Case& c, Tensors& tensors) {
  const petl::AdapterSizes size{c.rows, c.D, c.inner};
  const auto [R, D, B] = size;
  const auto weights = [&](const char* name, int64_t rows, int64_t columns, float deviation) {
    return ConstRows{tensors.normal(name, rows * columns, c.weights, deviation), columns, c.weights};
  };
  petl::AdapterInputs inputs = {};
  inputs.size = size;
  inputs.activation = petl::AdapterActivation::relu;
  inputs.x = {tensors.normal("x", R * D, kActivations, 1), D, kActivations};
  inputs.norm_weight = weights("norm_weight", 1, D, 1);
  inputs.norm_bias = weights("norm_bias", 1, D, 0.2f);
  inputs.down = weights("down", B, D, 0.05f);
  inputs.down_bias = weights("down_bias", 1, B, 0.1f);
  inputs.up = weights("up", D, B, 0.05f);
  inputs.up_bias = weights("up_bias", 1, D, 0.1f);
  inputs.scale = 1;
  inputs.epsilon = 1e-5f;
  return inputs;
}

petl::AdapterForward adapter_forward_of(const petl::AdapterInputs& inputs, Tensors& tensors) {
  const int64_t count = inputs.size.R * inputs.size.D;
  return {inputs, inputs.x, {tensors.make("out", count, kActivations), kActivations}};
}

petl::AdapterBackward adapter_backward_of(const petl::AdapterInputs& inputs, Tensors& tensors) {
  const auto [R, D, B] = inputs.size;
  petl::AdapterBackward args = {};
  args.inputs = inputs;
  args.dout = {tensors.normal("dout", R * D, kActivations, 1), D, kActivations};
  args.residual_is_input = true;
  args.dx = {tensors.make("dx", R * D, kActivations), kActivations};
  args.dnorm_weight = tensors.floats("dnorm_weight", D);
  args.dnorm_bias = tensors.floats("dnorm_bias", D);
  args.ddown = tensors.floats("ddown", B * D);
  args.ddown_bias = tensors.floats("ddown_bias", B);
  args.dup = tensors.floats("dup", D * B);
  args.dup_bias = tensors.floats("dup_bias", D);
  return args;
}

// With LayerNorm, and x as its own residual.
void run_adapter(const Case& c, Tensors& tensors) {
  const petl::AdapterInputs inputs = adapter_inputs_of(c, tensors);
  if (!c.is_backward()) {
    const petl::AdapterForward args = adapter_forward_of(inputs, tensors);
    void* packed = tensors.workspace("packed", petl::cuda::adapter_packed_bytes(args));
    void* workspace = tensors.workspace(petl::cuda::adapter_forward_workspace(args));
    expect_success(petl::cuda::adapter_forward(args, packed, false, workspace, kQueue));
    return;
  }
  const petl::AdapterBackward args = adapter_backward_of(inputs, tensors);
  void* workspace = tensors.workspace(petl::cuda::adapter_backward_workspace(args));
  expect_success(petl::cuda::adapter_backward(args, workspace, kQueue));
}

void run_hopper_adapter(const Case& c, Tensors& tensors) {
  const petl::AdapterInputs inputs = adapter_inputs_of(c, tensors);
  const auto tiles_bytes = [&](int passes) { return 2 * petl::cuda::hopper_packed_elements(c.D, c.inner, passes); };
  if (!c.is_backward()) {
    const petl::AdapterForward args = adapter_forward_of(inputs, tensors);
    const int64_t bytes = petl::cuda::adapter_hopper_packed_bytes(args);
    void* packed = tensors.workspace("packed", tiles_bytes(1), "vectors", bytes);
    expect_success(petl::cuda::adapter_hopper_forward(args, packed, false, kQueue));
    return;
  }
  const petl::AdapterBackward args = adapter_backward_of(inputs, tensors);
  const int64_t kept = c.rows * (c.inner + 7) / 8 * 8;
  const int64_t bytes = petl::cuda::adapter_hopper_backward_bytes(args);
  const petl::cuda::AdapterHopperKept found{tensors.workspace("packed", tiles_bytes(2), "room", bytes),
                                            tensors.workspace("statistics", sizeof(petl::cuda::RowStatistics) * c.rows),
                                            tensors.make("hidden", kept, kActivations),
                                            tensors.make("dhidden", kept, kActivations), nullptr};
  expect_success(petl::cuda::adapter_hopper_backward_rows(args, found, kQueue));
}

void run_attention_pool(const Case& c, Tensors& tensors) {
  const int64_t B = c.rows, N = c.tokens, D = c.D, H = c.inner;
  petl::AttentionPoolInputs inputs = {};
  inputs.size = {B, N, D, H};
  inputs.visual = {tensors.normal("visual", B * N * D, kActivations, 1), D, kActivations};
  inputs.visual_sample = N * D;
  inputs.query = {tensors.normal("query", B * H * D, c.weights, 0.05f), D, c.weights};
  inputs.scale = 0.125f;
  petl::AttentionPoolForward forward = {};
  forward.inputs = inputs;
  forward.pooled = {tensors.normal("pooled", B * H * D, kActivations, 1), kActivations};
  forward.statistics = tensors.floats("statistics", 2 * B * H);
  // Scores far below the greatest one, of heads of which no token has most of the weight.
  std::fill_n(forward.statistics, 2 * B * H, 100.0f);
  void* workspace = tensors.workspace(petl::cuda::attention_pool_forward_workspace(forward));
  if (c.runs_forward()) expect_success(petl::cuda::attention_pool_forward(forward, workspace, kQueue));
  if (!c.is_backward()) return;
  counts::take_launches();
  petl::AttentionPoolBackward args = {};
  args.inputs = inputs;
  args.dpooled = {tensors.normal("dpooled", B * H * D, kActivations, 1), D, kActivations};
  args.pooled = {forward.pooled.data, D, kActivations};
  args.statistics = forward.statistics;
  args.dvisual = {tensors.make("dvisual", B * N * D, kActivations), kActivations};
  args.dquery = tensors.floats("dquery", B * H * D);
  workspace = tensors.workspace(petl::cuda::attention_pool_backward_workspace(args));
  expect_success(petl::cuda::attention_pool_backward(args, workspace, kQueue));
}

void print_memory(const std::vector<counts::Memory>& all) {
  const char* separator = "";
  for (const counts::Memory& memory : all) {
    std::printf("%s[\"%s\", %" PRIuPTR ", %" PRIuPTR "]", separator, memory.name.c_str(), memory.begin, memory.end);
    separator = ", ";
  }
}

void print_numbers(const std::map<std::string, uint64_t>& numbers) {
  const char* separator = "";
  for (const auto& [what, number] : numbers) {
    std::printf("%s\"%s\": %" PRIu64, separator, what.c_str(), number);
    separator = ", ";
  }
}

void print_block(const counts::BlockCounts& block) {
  std::printf("{\"index\": [%u, %u, %u], ", block.index.x, block.index.y, block.index.z);
  print_numbers(block.counts);
  std::printf("}");
}

// Kernels are named by how far they lie from main, since a linker does not export the names of all.
void print_launch(const counts::LaunchCounts& launch) {
  const auto offset = static_cast<const char*>(launch.kernel) - reinterpret_cast<const char*>(&main);
  std::printf("{\"kernel\": %td, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"cluster\": %u, ", offset,
              launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x, launch.block.y, launch.block.z,
              launch.cluster);
  std::printf("\"shared_bytes\": %zu, ", launch.shared_bytes);
  std::printf("\"parameters\": \"");
  for (const unsigned char byte : launch.parameters) std::printf("%02x", byte);
  std::printf("\", \"memory\": [");
  print_memory(counts::memory());
  std::printf("], \"first_sectors\": {");
  for (const auto& [name, sectors] : launch.first_sectors) {
    if (name != launch.first_sectors.begin()->first) std::printf(", ");
    std::printf("\"%s\": [", name.c_str());
    for (const uint64_t& number : sectors) std::printf(&number == sectors.data() ? "%" PRIu64 : ", %" PRIu64, number);
    std::printf("]");
  }
  std::printf("}, \"sectors\": {");
  print_numbers(launch.sectors);
  std::printf("}, \"blocks\": [");
  for (const counts::BlockCounts& block : launch.blocks) {
    if (&block != launch.blocks.data()) std::printf(", ");
    print_block(block);
  }
  std::printf("]}\n");
}

void run(const Case& c) {
  using Run = void (*)(const Case&, Tensors&);
  const std::map<std::string, Run> ops{
      {"apt", &run_apt}, {"adapter", &run_adapter}, {"attention_pool", &run_attention_pool}};
  const std::map<std::string, Run> hopper_ops{{"apt", &run_hopper_apt}, {"adapter", &run_hopper_adapter}};
  Tensors tensors;
  (c.by_hopper ? hopper_ops : ops).at(c.op)(c, tensors);
  for (const counts::LaunchCounts& launch : counts::take_launches()) print_launch(launch);
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.size() < 7) {
    std::fprintf(stderr, "count_kernels must have 7 arguments, got %zu\n", words.size());
    return EXIT_FAILURE;
  }
  emulator::Settings settings;
  settings.threads = 1;
  const std::string how = words.size() > 7 ? words[7] : "";
  settings.samples_blocks = how == "sampled";
  emulator::configure(settings);
  const DType weights = words[2] == "float32" ? DType::float32 : DType::bfloat16;
  try {
    run({words[0], words[1], weights, std::stoll(words[3]), std::stoll(words[4]), std::stoll(words[5]),
         std::stoll(words[6]), how == "sampled", how == "hopper"});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "count_kernels: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
