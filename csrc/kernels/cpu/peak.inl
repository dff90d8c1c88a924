// What a processor's products reach at best: as many sums as the microkernel has, and nothing that is loaded or stored.
// A part of path.inl, in builds with PETL_TIME_WORK.

#ifdef PETL_MATRIX_PRODUCTS
// Floating-point operations per tick, in as many registers as a panel's sums have.
inline double peak_of_matrices() {
  constexpr int kRounds = 200, kTries = 2000;
  configure(MatrixShapes(kMatrixRows));
  uint64_t least = UINT64_MAX;
  for (int i = 0; i < kTries; ++i) {
    const uint64_t begin = __rdtsc();
    for (int round = 0; round < kRounds; ++round) {
      multiply_matrices<0, kLeft, kRight>();
      multiply_matrices<1, kLeft, kRight>();
      multiply_matrices<2, kLeft, kRight>();
      multiply_matrices<3, kLeft, kRight>();
    }
    least = std::min<uint64_t>(least, __rdtsc() - begin);
  }
  release();
  return 2.0 * 4 * kRounds * kMatrixRows * kLanes * 2 * kLanes / static_cast<double>(least);
}
#else
// Floating-point operations per tick.
template <class Arithmetic>
inline double peak_of_products() {
  constexpr int kSums = kTileRows * kPanelVectors, kRounds = 200, kTries = 2000;
  uint64_t least = UINT64_MAX;
  for (int i = 0; i < kTries; ++i) {
    Vec sums[kSums] = {}, a = {}, b = {};
    // Or the compiler would see that all are equal.
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) asm volatile("" : "+v"(sums[j]));
    const uint64_t begin = __rdtsc();
    for (int round = 0; round < kRounds; ++round) {
      asm volatile("" : "+v"(a), "+v"(b));  // or the compiler would compute them once
#pragma GCC unroll 32
      for (int j = 0; j < kSums; ++j) sums[j] = Arithmetic::multiply_add(a, b, sums[j]);
    }
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) asm volatile("" : : "v"(sums[j]));
    least = std::min<uint64_t>(least, __rdtsc() - begin);
  }
  return 2.0 * kSums * kRounds * kLanes * Arithmetic::kPerWord / static_cast<double>(least);
}
#endif
