// The instructions of matrix_registers.inl, done by other means: for processors that lack them, and for sanitizers,
// which do not see what assembler reads and writes. A part of path.inl.

struct EmulatedRegisters {
  MatrixShapes shapes{0};
  bool are_configured = false;
  float values[kMatrixRegisters][16][16];

  // Stops at what the processor would answer with an invalid instruction.
  void require(int which) const {
    if (!are_configured || shapes.rows[which] == 0) std::abort();
  }
};
inline thread_local EmulatedRegisters registers;

inline void configure(const MatrixShapes& shapes) {
  registers.shapes = shapes;
  registers.are_configured = true;
  memset(registers.values, 0, sizeof registers.values);
}

inline void release() { registers.are_configured = false; }

template <int kRegister>
inline void clear() {
  registers.require(kRegister);
  memset(registers.values[kRegister], 0, sizeof registers.values[kRegister]);
}

template <int kRegister>
inline void load_matrix(const float* source, int64_t stride) {
  clear<kRegister>();
  for (int row = 0; row < registers.shapes.rows[kRegister]; ++row) {
    memcpy(registers.values[kRegister][row], source + row * stride, registers.shapes.bytes_per_row[kRegister]);
  }
}

template <int kRegister>
inline void store_matrix(float* target, int64_t stride) {
  registers.require(kRegister);
  for (int row = 0; row < registers.shapes.rows[kRegister]; ++row) {
    memcpy(target + row * stride, registers.values[kRegister][row], registers.shapes.bytes_per_row[kRegister]);
  }
}

// The products of the pairs' first elements and those of their second ones are summed apart.
template <int kSum, int kFirst, int kSecond>
inline void multiply_matrices() {
  for (const int which : {kSum, kFirst, kSecond}) registers.require(which);
  for (int m = 0; m < registers.shapes.rows[kSum]; ++m) {
    Vec first = {}, second = {};
    for (int k = 0; k < registers.shapes.rows[kSecond]; ++k) {
      const BitsVec a = as_bits(broadcast(&registers.values[kFirst][m][k]));
      const BitsVec b = as_bits(load(registers.values[kSecond][k]));
      first += as_float(a << 16) * as_float(b << 16);
      second += as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
    }
    float* sums = registers.values[kSum][m];
    store(sums, load(sums) + (first + second));
  }
}
