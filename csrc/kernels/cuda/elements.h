// Elements of tensors by eights: what one thread reads or writes at once. All arithmetic is float32.
#pragma once
#include "kernels/cuda/ptx.h"
#include "kernels/tensor.h"

namespace petl::cuda {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Eight elements as they lie in memory.
template <class T>
struct Packed {
  uint4 words[sizeof(T) / 2];
};

template <class T>
__device__ __forceinline__ Packed<T> load(const T* source) {
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) packed.words[i] = reinterpret_cast<const uint4*>(source)[i];
  return packed;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bfloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ __forceinline__ float to_float(Float16 value) { return unpack_float16(value.bits).x; }

// Zeros where `valid` is false; `source` is not read then.
template <class T>
__device__ __forceinline__ Packed<T> load_if(bool valid, const T* source) {
  return valid ? load(source) : Packed<T>{};
}

template <class T>
__device__ __forceinline__ void store(T* target, const Packed<T>& packed) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(target)[i] = packed.words[i];
}

template <class T>
__device__ __forceinline__ void store_if(bool valid, T* target, const Packed<T>& packed) {
  if (valid) store(target, packed);
}

__device__ __forceinline__ void unpack(const Packed<float>& packed, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 word = packed.words[i];
    values[4 * i] = __uint_as_float(word.x);
    values[4 * i + 1] = __uint_as_float(word.y);
    values[4 * i + 2] = __uint_as_float(word.z);
    values[4 * i + 3] = __uint_as_float(word.w);
  }
}

__device__ __forceinline__ void unpack(const Packed<Bfloat16>& packed, float (&values)[8]) {
  const uint32_t pairs[] = {packed.words[0].x, packed.words[0].y, packed.words[0].z, packed.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(pairs[i] << 16);
    values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const Packed<Float16>& packed, float (&values)[8]) {
  const uint32_t pairs[] = {packed.words[0].x, packed.words[0].y, packed.words[0].z, packed.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_float16(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, Bfloat16) { return pack_bfloat16(low, high); }
__device__ __forceinline__ uint32_t pack_pair(float low, float high, Float16) { return pack_float16(low, high); }

template <class T>
__device__ __forceinline__ Packed<T> pack(const float (&values)[8]) {
  return {{{pack_pair(values[0], values[1], T{}), pack_pair(values[2], values[3], T{}),
            pack_pair(values[4], values[5], T{}), pack_pair(values[6], values[7], T{})}}};
}

template <>
__device__ __forceinline__ Packed<float> pack<float>(const float (&values)[8]) {
  return {
      {{__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]), __float_as_uint(values[3])},
       {__float_as_uint(values[4]), __float_as_uint(values[5]), __float_as_uint(values[6]),
        __float_as_uint(values[7])}}};
}

// values - T(values): what rounding to T leaves out.
template <class T>
__device__ __forceinline__ void subtract_rounded(const Packed<T>& rounded, float (&values)[8]) {
  float kept[8];
  unpack(rounded, kept);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] -= kept[i];
}

// Eight elements of a tensor whose dtype is known at run time only, still as they lie in memory.
struct AnyPacked {
  uint4 words[2];
};

__device__ __forceinline__ void unpack(const AnyPacked& packed, DType dtype, float (&values)[8]) {
  if (dtype == DType::float32) {
    unpack(Packed<float>{{packed.words[0], packed.words[1]}}, values);
  } else if (dtype == DType::bfloat16) {
    unpack(Packed<Bfloat16>{{packed.words[0]}}, values);
  } else {
    unpack(Packed<Float16>{{packed.words[0]}}, values);
  }
}

__device__ __forceinline__ float load_scalar(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::bfloat16 ? __uint_as_float(bits << 16) : unpack_float16(bits).x;
}

}  // namespace petl::cuda
