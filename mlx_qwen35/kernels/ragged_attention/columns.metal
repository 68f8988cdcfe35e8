// Rows of D values as the threads of a SIMD group hold them: COLUMNS neighbours each.

// The values in a word of 32 bits: one float, or two of 16 bits, the lower first.
template <typename T, int SIZE = sizeof(T)>
struct Packed {
  static METAL_FUNC void open(thread float* to, uint word) {
    to[0] = static_cast<float>(as_type<T>(static_cast<ushort>(word & 0xffffu)));
    to[1] = static_cast<float>(as_type<T>(static_cast<ushort>(word >> 16)));
  }
};
template <typename T>
struct Packed<T, 4> {
  static METAL_FUNC void open(thread float* to, uint word) { to[0] = as_type<float>(word); }
};

// What thread `lane` holds of a row; 0 behind its end. WIDE: rows of 32 * COLUMNS values, 16 bytes at a time.
template <int COLUMNS, int D, bool WIDE, typename T>
METAL_FUNC void load_columns(thread float* to, const device T* row, int lane) {
  if (WIDE) {
    const int words = COLUMNS * sizeof(T) / 4, each = 4 / sizeof(T);
    const device uint4* from = (const device uint4*)(row + lane * COLUMNS);
    #pragma unroll
    for (int n = 0; n < words / 4; ++n) {
      const uint4 four = from[n];
      Packed<T>::open(to + (4 * n + 0) * each, four.x);
      Packed<T>::open(to + (4 * n + 1) * each, four.y);
      Packed<T>::open(to + (4 * n + 2) * each, four.z);
      Packed<T>::open(to + (4 * n + 3) * each, four.w);
    }
  } else {
    #pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = lane * COLUMNS + c;
      to[c] = column < D ? static_cast<float>(row[column < D ? column : 0]) : 0.0f;
    }
  }
}

// The n-th of the arrays.
template <typename P>
METAL_FUNC P nth(int n, P a, P b, P c, P d, P e, P f, P g, P h, P i, P j, P k, P l, P m) {
  if (n < 6) {
    return n < 3 ? (n == 0 ? a : n == 1 ? b : c) : n == 3 ? d : n == 4 ? e : f;
  }
  return n < 9 ? (n == 6 ? g : n == 7 ? h : i) : n < 11 ? (n == 9 ? j : k) : n == 11 ? l : m;
}
