// Rows of weights in every form that kernels read, 16 values at a time.
//
// FORM: the bits of an affine form (2, 3, 4, 5, 6, 8), 40 for mxfp4, 0 for values as they are. GROUP: how many values a
// scale is for, a multiple of 16. Affine and mxfp4 weights are one stream of bits, the lowest first: value i of a row
// starts at bit i * bits, so that a block of 16 values is `bits` halfwords.
enum { BLOCK = 16 };

// Form<FORM>::dot: what a block adds to a dot product. x: its 16 values; total: their sum; block: its number, counted
// through all rows and matrices. Values are added in their order, in float.
template <int BITS>
struct Form {
  template <int GROUP, typename S>
  static METAL_FUNC float dot(
      const thread float* x, float total, const device uint32_t* weights, S scales, S biases, size_t block) {
    const device uint16_t* words = (const device uint16_t*)weights + block * BITS;
    uint w[BITS];
    for (int i = 0; i < BITS; ++i) {
      w[i] = words[i];
    }
    float sum = 0.0f;
    for (int i = 0; i < BLOCK; ++i) {
      const int word = i * BITS / 16, shift = i * BITS % 16;
      uint q = w[word] >> shift;
      if (shift + BITS > 16) {
        q |= w[word + 1] << (16 - shift);
      }
      sum += x[i] * static_cast<float>(q & ((1u << BITS) - 1u));
    }
    const size_t group = block * BLOCK / GROUP;
    return static_cast<float>(scales[group]) * sum + static_cast<float>(biases[group]) * total;
  }
};

// mxfp4: a sign, two bits of exponent, one of mantissa; a scale is a power of two. It has no biases.
template <>
struct Form<40> {
  template <int GROUP, typename S>
  static METAL_FUNC float dot(
      const thread float* x, float total, const device uint32_t* weights, S scales, S biases, size_t block) {
    float sum = 0.0f;
    for (int i = 0; i < BLOCK; ++i) {
      const uint q = weights[block * 2 + i / 8] >> (4 * (i % 8));
      const uint size = q & 7u;  // 0 and 1 are 0 and 0.5; from 2 on exponent and mantissa are those of a float
      const float small = 0.5f * static_cast<float>(size);
      const float large = as_type<float>(((size >> 1) + 126u) << 23 | (size & 1u) << 22);
      const float value = size < 2u ? small : large;
      sum += x[i] * ((q & 8u) ? -value : value);
    }
    const uint exponent = static_cast<uint>(scales[block * BLOCK / GROUP]);
    return as_type<float>(exponent == 0u ? 0x00400000u : exponent << 23) * sum;
  }
};

template <>
struct Form<0> {
  template <int GROUP, typename W, typename S>
  static METAL_FUNC float dot(const thread float* x, float total, W weights, S scales, S biases, size_t block) {
    float sum = 0.0f;
    for (int i = 0; i < BLOCK; ++i) {
      sum += x[i] * static_cast<float>(weights[block * BLOCK + i]);
    }
    return sum;
  }
};

// values: 16 of them from `from` on -> their sum.
template <typename X>
METAL_FUNC float load_block(thread float* values, X from) {
  float total = 0.0f;
  for (int i = 0; i < BLOCK; ++i) {
    values[i] = static_cast<float>(from[i]);
    total += values[i];
  }
  return total;
}
