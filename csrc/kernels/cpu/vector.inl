// One source for every instruction set: GCC's and Clang's vector types, sized by the file that includes this.
// A part of path.inl.

constexpr int kLanes = PETL_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(PETL_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(PETL_VECTOR_BYTES)));
typedef uint32_t BitsVec __attribute__((vector_size(PETL_VECTOR_BYTES)));
typedef uint16_t HalfBitsVec __attribute__((vector_size(PETL_VECTOR_BYTES / 2)));

inline Vec as_float(BitsVec bits) { return (Vec)bits; }
inline BitsVec as_bits(Vec value) { return (BitsVec)value; }

template <class Wanted>
inline Wanted read(const void* source) {
  Wanted value;
  memcpy(&value, source, sizeof value);
  return value;
}

// Every lane holds the 32 bits at `source`. An integer sum: the float32 sum with zero is not the identity at -0, and
// the compiler would have to compute it.
inline Vec broadcast(const float* source) { return as_float(BitsVec{} + read<uint32_t>(source)); }

inline Vec from_bfloat16(HalfBitsVec bits) {
#ifdef PETL_AVX512_BF16
  // GCC would widen the halves apart, and put them together.
  return as_float((BitsVec)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
  return as_float(__builtin_convertvector(bits, BitsVec) << 16);
#endif
}

// Round to nearest even; a NaN stays one. AVX-512's own instruction takes float32 numbers below the normal ones,
// 1.2e-38, for zero, as its products do with such factors: what is lost is less than any result can show.
inline HalfBitsVec to_bfloat16(Vec value) {
#if defined(PETL_AVX512_BF16)
  return (HalfBitsVec)_mm512_cvtneps_pbh((__m512)value);
#elif defined(PETL_NEON_BF16)
  return (HalfBitsVec)vcvt_bf16_f32((float32x4_t)value);
#else
  const BitsVec bits = as_bits(value);
  const BitsVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const BitsVec quiet_nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(value == value ? rounded : quiet_nan, HalfBitsVec);
#endif
}

inline Vec from_float16(HalfBitsVec half) {
  const BitsVec bits = __builtin_convertvector(half, BitsVec);
  const BitsVec magnitude = bits & 0x7fff;
  // Read as float32, the exponent is 112 too small; the product also brings subnormal numbers to their value.
  const Vec finite = as_float(magnitude << 13) * 0x1p112f;
  const BitsVec infinite_or_nan = (magnitude << 13) | 0x7f800000;
  const BitsVec value = magnitude >= 0x7c00 ? infinite_or_nan : as_bits(finite);
  return as_float(value | (bits & 0x8000) << 16);
}

// Round to nearest even; from 65520 on infinity; a NaN stays one.
inline HalfBitsVec to_float16(Vec value) {
  const BitsVec magnitude = as_bits(value) & 0x7fffffff;
  // 0.5 has the unit in the last place of a float16 subnormal: the addition rounds, and the low bits are the result.
  const BitsVec subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  const BitsVec normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const BitsVec finite = magnitude < (113u << 23) ? subnormal : normal;
  const BitsVec beyond = magnitude > 0x7f800000 ? BitsVec{} + 0x7e00 : BitsVec{} + 0x7c00;
  const BitsVec half = magnitude < (143u << 23) ? finite : beyond;
  return __builtin_convertvector(half | (as_bits(value) >> 16 & 0x8000), HalfBitsVec);
}

inline Vec load(const float* source) { return read<Vec>(source); }
inline void store(float* target, Vec value) { memcpy(target, &value, sizeof value); }

inline size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Elements of one type in memory, float32 in registers. The type is fixed at compile time: a switch at every vector
// costs as much as the arithmetic between a load and a store.
template <DType kDType>
struct Elements {
  static constexpr DType kType = kDType;
  static constexpr int kBytes = kType == DType::float32 ? 4 : 2;

  static Vec load(const void* source) {
    if constexpr (kType == DType::float32) return read<Vec>(source);
    if constexpr (kType == DType::bfloat16) return from_bfloat16(read<HalfBitsVec>(source));
    if constexpr (kType == DType::float16) return from_float16(read<HalfBitsVec>(source));
  }

  static void store(void* target, Vec value) {
    if constexpr (kType == DType::float32) {
      memcpy(target, &value, sizeof value);
    } else {
      const HalfBitsVec half = kType == DType::bfloat16 ? to_bfloat16(value) : to_float16(value);
      memcpy(target, &half, sizeof half);
    }
  }

  // The first `count` elements; what lies beyond reads as zero and is not written.
  static Vec load_part(const void* source, int64_t count) {
    if (count >= kLanes) return load(source);
    float buffer[kLanes] = {};
    memcpy(buffer, source, count * kBytes);
    return load(buffer);
  }

  static void store_part(void* target, Vec value, int64_t count) {
    if (count >= kLanes) return store(target, value);
    float buffer[kLanes];
    store(buffer, value);
    memcpy(target, buffer, count * kBytes);
  }
};

using Floats = Elements<DType::float32>;

// function(Elements<dtype>{})
template <class Function>
inline void with_elements(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(Elements<DType::float32>{});
    case DType::bfloat16:
      return function(Elements<DType::bfloat16>{});
    case DType::float16:
      return function(Elements<DType::float16>{});
  }
}

// A bit for each lane of a comparison.
inline uint32_t lanes_where(IntVec is_true) {
#ifdef PETL_AVX512_BF16
  return _mm512_movepi32_mask((__m512i)is_true);
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (is_true[lane] & 1u) << lane;
  return bits;
#endif
}

// Lanes are combined in one fixed order, in float64 for a sum.
inline double sum_lanes(Vec value) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// A square of as many vectors as lanes: row i becomes column i.
#ifdef PETL_AVX512_BF16
template <int kStep>
inline void exchange_lanes(Vec (&rows)[kLanes]) {
  IntVec of_first, of_second;  // which lanes the two rows take; from kLanes on, those of the second
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    of_first[lane] = lane & kStep ? kLanes + (lane ^ kStep) : lane;
    of_second[lane] = lane & kStep ? kLanes + lane : lane ^ kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vec first = rows[i], second = rows[i + kStep];
    rows[i] = (Vec)_mm512_permutex2var_ps((__m512)first, (__m512i)of_first, (__m512)second);
    rows[i + kStep] = (Vec)_mm512_permutex2var_ps((__m512)first, (__m512i)of_second, (__m512)second);
  }
}

inline void transpose(Vec (&rows)[kLanes]) {
  exchange_lanes<1>(rows);
  exchange_lanes<2>(rows);
  exchange_lanes<4>(rows);
  exchange_lanes<8>(rows);
}
#else
inline void transpose(Vec (&rows)[kLanes]) {
  float values[kLanes][kLanes], transposed[kLanes][kLanes];
  memcpy(values, rows, sizeof values);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) transposed[j][i] = values[i][j];
  }
  memcpy(rows, transposed, sizeof transposed);
}
#endif

// exp(value) for value <= 0, to about one unit in the last place; below -87 zero.
inline Vec exp_nonpositive(Vec value) {
  constexpr float kRound = 0x1.8p23f;  // adding and taking it away rounds to an integer
  const Vec exponent = (value * 1.44269504f + kRound) - kRound;
  // ln 2 in two parts: the first has few bits, so its product is exact.
  const Vec rest = (value - exponent * 0x1.62e4p-1f) - exponent * 0x1.7f7d1cp-20f;
  Vec series = Vec{} + 1.0f / 720;
  for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * rest + coefficient;
  const IntVec power = (__builtin_convertvector(exponent, IntVec) + 127) << 23;
  return value < -87.0f ? Vec{} : series * (Vec)power;
}

// Asks for the cache lines of `bytes` from `first` on, to be read or to be written.
template <bool kWrite>
inline void prefetch_lines(const char* first, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, kWrite);
}
