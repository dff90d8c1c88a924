// What the Hopper path takes for granted of the hardware, each asked on its own by a small kernel. The emulator answers
// in hopper_test.cpp; a GPU in hopper_questions.cpp, so that what is wrong there is not these programs' fault.
#pragma once
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/hopper_ptx.h"
#include "kernels/cuda/tile_maps.h"

namespace hopper_questions {

using namespace petl::cuda;

// Called with each answer.
using Tell = std::function<void(bool right, const std::string& question)>;

#ifdef __CUDACC__
// Memory of host and device, and what an earlier kernel did to the device.
template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) std::abort();
  return static_cast<T*>(memory);
}
inline bool is_done() { return cudaDeviceSynchronize() == cudaSuccess; }
#else
template <class T>
T* allocate(size_t count) {
  static std::vector<std::unique_ptr<void, decltype(&std::free)> > kept;
  kept.emplace_back(std::aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256), &std::free);
  return static_cast<T*>(kept.back().get());
}
inline bool is_done() { return true; }
#endif

// Until the program's end: a kernel that hangs must not find its memory gone.
template <class T>
T* filled(const std::vector<T>& values) {
  T* const memory = allocate<T>(values.size());
  std::memcpy(memory, values.data(), values.size() * sizeof(T));
  return memory;
}

template <class... Parameters>
bool run(int blocks, int cluster, int threads, int shared_bytes, void (*kernel)(Parameters...),
         const Parameters&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                       shared_bytes);
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) == cudaSuccess && is_done();
}

// Small integers, of which products and sums are exact in every format.
inline std::vector<float> small_integers(size_t count) {
  static std::mt19937 random(1);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 17) - 8);
  return values;
}

inline uint16_t bits_of(float value, Bfloat16) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}
inline uint16_t bits_of(float value, Float16) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t magnitude = (bits & 0x7fffffff) >> 13;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (magnitude ? magnitude - (112 << 10) : 0));
}

inline std::string name_of(Bfloat16) { return "bfloat16"; }
inline std::string name_of(Float16) { return "float16"; }

inline int swizzled_place(int element, int columns) {
  return static_cast<int>(swizzled(static_cast<uint32_t>(element) * 2, static_cast<uint32_t>(columns) * 2) / 2);
}

// A tile as copies and products see it.
template <class T>
std::vector<uint16_t> tile_of(const std::vector<float>& values, int columns) {
  std::vector<uint16_t> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    bits[swizzled_place(static_cast<int>(i), columns)] = bits_of(values[i], T{});
  }
  return bits;
}

// Of [rows, columns] by tiles of 64 x 64.
inline bool make_map(TileMap& map, uint16_t* data, int rows, int columns) {
  const EncodeTiles encode = tile_encoder();
  return encode && encode_tiles(encode, map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, rows, columns, columns, 64);
}

__device__ inline Barrier* new_barrier(unsigned char* at, int arrivals) {
  Barrier* const barrier = reinterpret_cast<Barrier*>(at);
  if (threadIdx.x == 0) {
    make_barrier(barrier, arrivals);
    show_barriers();
  }
  __syncthreads();
  return barrier;
}

// Products: out [64, 2 kSums] = left [64, columns] right [2 kSums, columns]^T, of tiles as wide as their swizzle. The
// right one lies behind `offset` bytes, as pieces of other widths would.

constexpr int kLeftBytes = 64 * 128, kMostOffset = 24576, kRightBytes = 256 * 128,
              kProductBytes = kLeftBytes + kMostOffset + kRightBytes + 8;

struct Product {
  const uint16_t *left, *right;
  int offset;
  bool from_registers;
  float* out;
};

template <class T, int kSums, int kColumns>
__global__ void multiply_group(Product task) {
  unsigned char *const memory = tile_memory(), *const right_tile = memory + kLeftBytes + task.offset;
  constexpr int kRowBytes = kColumns * 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Barrier* const full = new_barrier(memory + kProductBytes - 8, 1);
  if (threadIdx.x == 0) {
    arrive_and_expect(full, (64 + kSums * 2) * kRowBytes);
    copy_bulk(memory, task.left, 64 * kRowBytes, full);
    copy_bulk(right_tile, task.right, kSums * 2 * kRowBytes, full);
  }
  wait(full, 0);
  float sums[kSums] = {};
  uint32_t left[kColumns / 16][4];
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    const uint32_t at = (warp * 16 + lane % 16) * kRowBytes + step * 32 + lane / 16 * 16;
    load_matrices(left[step], memory + swizzled(at, kRowBytes));
  }
  fence_products(sums);
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    const uint64_t right = describe_tile(right_tile, kRowBytes) + 2 * step;
    if constexpr (kSums == 32) {
      if (task.from_registers) {
        multiply_registers<T>(sums, left[step], right, 1);
        continue;
      }
    }
    multiply_tiles<T>(sums, describe_tile(memory, kRowBytes) + 2 * step, right);
  }
  commit_products();
  wait_for_products<0>(sums);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    task.out[row * kSums * 2 + column] = sums[i];
  }
}

template <class T, int kSums, int kColumns>
void ask_product(const Tell& tell, int offset, bool from_registers) {
  constexpr int kWidth = kSums * 2;
  const std::vector<float> left = small_integers(64 * kColumns), right = small_integers(kWidth * kColumns);
  std::vector<float> wanted(64 * kWidth);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kWidth; ++column) {
      for (int inner = 0; inner < kColumns; ++inner) {
        wanted[row * kWidth + column] += left[row * kColumns + inner] * right[column * kColumns + inner];
      }
    }
  }
  float* const out = filled(std::vector<float>(wanted.size(), -1));
  const Product task{filled(tile_of<T>(left, kColumns)), filled(tile_of<T>(right, kColumns)), offset, from_registers,
                     out};
  const bool ran = run(1, 1, 128, kProductBytes, &multiply_group<T, kSums, kColumns>, task);
  tell(ran && std::memcmp(out, wanted.data(), wanted.size() * sizeof(float)) == 0,
       std::string("a product of ") + name_of(T{}) + ", 64 x " + std::to_string(kWidth) + " x " +
           std::to_string(kColumns) + ", left from " + (from_registers ? "registers" : "shared memory") +
           ", right behind " + std::to_string(offset) + " bytes");
}

// A tile that hangs over the matrix's edges: zeros are read, and nothing is written there.

__global__ void copy_edge(const __grid_constant__ TileMap from, const __grid_constant__ TileMap to, uint16_t* seen) {
  unsigned char* const memory = tile_memory();
  Barrier* const full = new_barrier(memory + 8192, 1);
  if (threadIdx.x > 0) return;
  arrive_and_expect(full, 8192);
  copy_tile(memory, from, 64, 32, full);
  wait(full, 0);
  for (int i = 0; i < 64 * 64; ++i) seen[i] = *reinterpret_cast<uint16_t*>(memory + swizzled(i * 2, 128));
  store_tile(to, 64, 32, memory);
  commit_stores();
  wait_for_reads<0>();
}

inline void ask_edges(const Tell& tell) {
  constexpr int kRows = 50, kColumns = 80;
  std::vector<uint16_t> numbers(kRows * kColumns);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint16_t>(i + 10);
  uint16_t *const from = filled(numbers), *const to = filled(std::vector<uint16_t>(numbers.size(), 7)),
                  *const seen = filled(std::vector<uint16_t>(64 * 64, 9));
  TileMap map_from, map_to;
  const bool mapped = make_map(map_from, from, kRows, kColumns) && make_map(map_to, to, kRows, kColumns);
  tell(mapped, "maps of tiles");
  const bool ran = mapped && run(1, 1, 32, 8200, &copy_edge, map_from, map_to, seen);
  bool reads = ran, writes = ran;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      const bool is_inside = 32 + row < kRows && 64 + column < kColumns;
      reads &= seen[row * 64 + column] == (is_inside ? from[(32 + row) * kColumns + 64 + column] : 0);
    }
  }
  for (int i = 0; i < kRows * kColumns; ++i) {
    writes &= to[i] == (i / kColumns >= 32 && i % kColumns >= 64 ? from[i] : 7);
  }
  tell(reads, "a tile's swizzle of 128 bytes, and zeros outside of the matrix");
  tell(writes, "a store of a tile, of what is inside of the matrix alone");
}

// What stmatrix wrote, a store of a tile takes after the fence.

__global__ void store_fragments(const __grid_constant__ TileMap to) {
  unsigned char* const memory = tile_memory();
  const int lane = threadIdx.x;
  for (int half = 0; half < 16; ++half) {
    const int rows = half / 4 * 16, columns = half % 4 * 16;
    uint32_t parts[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t value = (rows + lane / 4 + i % 2 * 8) * 64 + columns + lane % 4 * 2 + i / 2 * 8;
      parts[i] = value | (value + 1) << 16;
    }
    store_matrices(memory + swizzled((rows + lane % 16) * 128 + columns * 2 + lane / 16 * 16, 128), parts);
  }
  show_writes();
  __syncwarp();
  if (lane > 0) return;
  store_tile(to, 0, 0, memory);
  commit_stores();
  wait_for_reads<0>();
}

inline void ask_stores(const Tell& tell) {
  uint16_t* const to = filled(std::vector<uint16_t>(64 * 64, 9));
  TileMap map;
  bool right = make_map(map, to, 64, 64) && run(1, 1, 32, 8192, &store_fragments, map);
  for (int i = 0; i < 64 * 64; ++i) right &= to[i] == i;
  tell(right, "stmatrix, fence.proxy.async and a store of the tile");
}

// Each of two blocks copies half of a row to both, and says at both barriers when it has read it.

__global__ void share_row(const int4* row, int4* out) {
  unsigned char* const memory = tile_memory();
  Barrier *const full = reinterpret_cast<Barrier*>(memory + 1024), *const read = full + 1;
  const int rank = rank_in_cluster();
  if (threadIdx.x == 0) {
    make_barrier(full, 1);
    make_barrier(read, 2);
    show_barriers();
  }
  synchronize_cluster();
  if (threadIdx.x == 0) {
    arrive_and_expect(full, 1024);
    copy_bulk_to(3, memory + rank * 512, row + rank * 32, 512, full);
  }
  wait(full, 0);
  for (int i = threadIdx.x; i < 64; i += blockDim.x) out[blockIdx.x * 64 + i] = reinterpret_cast<int4*>(memory)[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_at(read, 0);
    arrive_at(read, 1);
  }
  wait(read, 0);
  synchronize_cluster();
}

inline void ask_clusters(const Tell& tell) {
  std::vector<int4> numbers(64);
  for (int i = 0; i < 64; ++i) numbers[i] = {i, i + 1, i + 2, i + 3};
  int4 *const row = filled(numbers), *const out = filled(std::vector<int4>(4 * 64));
  bool right = run(4, 2, 32, 1040, &share_row, static_cast<const int4*>(row), out);
  for (int i = 0; i < 4 * 64; ++i) right &= out[i].x == i % 64 && out[i].w == i % 64 + 3;
  tell(right, "clusters of two: copies to both blocks, and arrivals from the other one");
}

// 24 registers of one warpgroup's threads for 240 of the others'.
__global__ void __launch_bounds__(384, 1) exchange_registers(int* out) {
  if (threadIdx.x >= 256) {
    give_up_registers<24>();
  } else {
    take_registers<240>();
    out[threadIdx.x] = static_cast<int>(threadIdx.x);
  }
}

inline void ask_registers(const Tell& tell) {
  int* const out = filled(std::vector<int>(256, -1));
  bool right = run(1, 1, 384, 0, &exchange_registers, out);
  for (int i = 0; i < 256; ++i) right &= out[i] == i;
  tell(right, "registers that change hands");
}

template <int kColumns>
void ask_products_as_wide_as(const Tell& tell) {
  for (const bool from_registers : {false, true}) {
    ask_product<Bfloat16, 32, kColumns>(tell, 0, from_registers);
    ask_product<Float16, 32, kColumns>(tell, 0, from_registers);
  }
  ask_product<Bfloat16, 104, kColumns>(tell, 0, false);
}

inline void ask_all(const Tell& tell) {
  ask_edges(tell);
  ask_stores(tell);
  ask_products_as_wide_as<64>(tell);
  ask_products_as_wide_as<32>(tell);
  ask_products_as_wide_as<16>(tell);
  // The last pieces of 208 and of 96 inner columns, behind wider ones.
  ask_product<Bfloat16, 32, 16>(tell, 192 * 128, true);
  ask_product<Bfloat16, 32, 32>(tell, 64 * 128, true);
  ask_product<Bfloat16, 48, 64>(tell, 0, false);
  ask_product<Bfloat16, 64, 64>(tell, 0, false);
  ask_product<Float16, 96, 64>(tell, 0, false);
  ask_product<Float16, 128, 64>(tell, 0, false);
  ask_registers(tell);
  ask_clusters(tell);
}

}  // namespace hopper_questions
