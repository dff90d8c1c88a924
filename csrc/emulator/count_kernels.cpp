// Runs one op on random tensors and writes, as a line of JSON for each launch, what it asked of the machine:
//
//     count_kernels <op> <forward|backward> <bfloat16|float32> <rows or samples> <width> <inner size> <tokens>
//                   [sampled]
//
// Activations are bfloat16; the dtype is that of the weights. Tokens are attention pooling's. With `sampled` only the
// first block of each launch and its neighbors, the middle one and the last run, and what backward needs of forward is
// made up, so products that are not wanted cannot be told. bench/counts.py reads this.
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
#include "kernels/cuda/apt.h"
#include "kernels/cuda/attention_pool.h"

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
  bool sampled;

  bool is_backward() const { return direction == "backward"; }
  bool runs_forward() const { return !is_backward() || !sampled; }
};

size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Device memory; its pages exist once they are touched.
class Tensors {
 public:
  // Uninitialized.
  void* make(const std::string& name, int64_t count, DType dtype) {
    const size_t bytes = static_cast<size_t>(count) * size_of(dtype);
    const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = std::aligned_alloc(kAlignment, whole + kAlignment);
    all_.emplace_back(memory, &std::free);
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

 private:
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

void run_apt(const Case& c, Tensors& tensors) {
  const petl::AptSizes size{c.rows, c.D, c.inner};
  const auto [R, D, P] = size;
  const ConstRows x{tensors.normal("x", R * D, kActivations, 1), D, kActivations},
      y{tensors.normal("y", R * D, kActivations, 1), D, kActivations},
      prompts{tensors.normal("prompts", P * D, c.weights, 0.05f), D, c.weights},
      keys{tensors.normal("keys", P * D, c.weights, 0.05f), D, c.weights},
      log_scale{tensors.normal("log_scale", 1, c.weights, 0.1f), 1, c.weights};
  float* gate = static_cast<float*>(tensors.normal("gate", R, DType::float32, 1));
  void* scores = c.is_backward() ? tensors.normal("scores", R * size.kept(), kActivations, 1) : nullptr;
  petl::AptForward forward = {};
  forward.size = size;
  forward.activation = petl::Activation::relu;
  forward.x = x;
  forward.y = y;
  forward.prompts = prompts;
  forward.keys = keys;
  forward.log_scale = log_scale;
  forward.out = {tensors.make("out", R * D, kActivations), kActivations};
  forward.gate = gate;
  forward.scores = {scores, kActivations};
  void* packed = tensors.workspace("packed", petl::cuda::apt_packed_bytes(forward));
  void* workspace = tensors.workspace(petl::cuda::apt_forward_workspace(forward));
  if (c.runs_forward())
    expect_success(petl::cuda::apt_forward(forward, packed, petl::cuda::AptDone::nothing, workspace, kQueue));
  if (!c.is_backward()) return;
  counts::take_launches();
  petl::AptBackward args = {};
  args.size = size;
  args.activation = petl::Activation::relu;
  args.dout = {tensors.normal("dout", R * D, kActivations, 1), D, kActivations};
  args.x = x;
  args.y = y;
  args.prompts = prompts;
  args.keys = keys;
  args.log_scale = log_scale;
  args.gate = gate;
  args.scores = {scores, size.kept(), kActivations};
  args.dx = {tensors.make("dx", R * D, kActivations), kActivations};
  args.dy = {tensors.make("dy", R * D, kActivations), kActivations};
  args.dprompts = tensors.floats("dprompts", P * D);
  args.dkeys = tensors.floats("dkeys", P * D);
  args.dlog_scale = tensors.floats("dlog_scale", 1);
  workspace = tensors.workspace(petl::cuda::apt_backward_workspace(args));
  expect_success(petl::cuda::apt_backward(args, workspace, kQueue));
}

// With LayerNorm, and x as its own residual.
void run_adapter(const Case& c, Tensors& tensors) {
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
  if (!c.is_backward()) {
    const petl::AdapterForward args{inputs, inputs.x, {tensors.make("out", R * D, kActivations), kActivations}};
    void* packed = tensors.workspace("packed", petl::cuda::adapter_packed_bytes(args));
    void* workspace = tensors.workspace(petl::cuda::adapter_forward_workspace(args));
    expect_success(petl::cuda::adapter_forward(args, packed, false, workspace, kQueue));
    return;
  }
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
  void* workspace = tensors.workspace(petl::cuda::adapter_backward_workspace(args));
  expect_success(petl::cuda::adapter_backward(args, workspace, kQueue));
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

void print_block(const counts::BlockCounts& block) {
  std::printf("{\"index\": [%u, %u, %u]", block.index.x, block.index.y, block.index.z);
  for (const auto& [what, number] : block.counts) std::printf(", \"%s\": %" PRIu64, what.c_str(), number);
  std::printf("}");
}

// Kernels are named by how far they lie from main, since a linker does not export the names of all.
void print_launch(const counts::LaunchCounts& launch) {
  const auto offset = static_cast<const char*>(launch.kernel) - reinterpret_cast<const char*>(&main);
  std::printf("{\"kernel\": %td, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared_bytes\": %zu, ", offset,
              launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x, launch.block.y, launch.block.z,
              launch.shared_bytes);
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
  std::printf("}, \"blocks\": [");
  for (const counts::BlockCounts& block : launch.blocks) {
    if (&block != launch.blocks.data()) std::printf(", ");
    print_block(block);
  }
  std::printf("]}\n");
}

void run(const Case& c) {
  const std::map<std::string, void (*)(const Case&, Tensors&)> ops{
      {"apt", &run_apt}, {"adapter", &run_adapter}, {"attention_pool", &run_attention_pool}};
  Tensors tensors;
  ops.at(c.op)(c, tensors);
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
  settings.samples_blocks = words.size() > 7 && words[7] == "sampled";
  emulator::configure(settings);
  const DType weights = words[2] == "float32" ? DType::float32 : DType::bfloat16;
  try {
    run({words[0], words[1], weights, std::stoll(words[3]), std::stoll(words[4]), std::stoll(words[5]),
         std::stoll(words[6]), settings.samples_blocks});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "count_kernels: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
