// How an op shares out its rows among threads: in tiles, and in backward in slabs of tiles.
// A part of path.inl.

// Rows that one thread takes at a time: what is computed of them stays in its cache, and the packed weights are read
// once for them.
constexpr int64_t kRowsPerTile = 16 * kTileRows;
// Backward gathers what meets the rows in the weight gradients for this many rows. A fixed number, and slabs are added
// in order: the result does not depend on the number of threads.
constexpr int64_t kRowsPerSlab = 2048;

// Calls tile(begin, rows, scratch) for tiles that cover [begin, end).
template <class Tile>
inline void for_each_tile(int64_t begin, int64_t end, int64_t scratch_floats, ParallelFor parallel_for,
                          const Tile& tile) {
  parallel_for(round_up(end - begin, kRowsPerTile) / kRowsPerTile, [&](int64_t first, int64_t last) {
    float* scratch = tile_scratch().reserve(scratch_floats);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = begin + i * kRowsPerTile;
      tile(row, std::min(kRowsPerTile, end - row), scratch);
    }
    tile_scratch().release_excess();
  });
}

// The width of a row of so many columns in working memory, whatever a word holds: what lies beyond stays zero.
template <class Arithmetic>
inline int64_t padded_width(int64_t columns) {
  return round_up(columns, Arithmetic::kPerWord * kLanes);
}

inline float read_scalar(const ConstRows& scalar) {
  float value = 0;
  with_elements(scalar.dtype, [&](auto elements) { value = elements.load_part(scalar.data, 1)[0]; });
  return value;
}

// A row of a tensor in float32, with zeros up to whole vectors.
inline void widen_row(const ConstRows& source, int64_t width, float* target) {
  with_elements(source.dtype, [&](auto elements) {
    const char* from = row_of(source, 0);
    for (int64_t i = 0; i < width; i += kLanes) {
      store(target + i, elements.load_part(from + i * elements.kBytes, width - i));
    }
  });
}
