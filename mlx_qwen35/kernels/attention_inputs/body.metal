// Norm and rotary positions of queries and keys, and gates side by side. A SIMD group a head of a token, SIMDS of them a
// threadgroup; the first HQ heads of a token are queries. queries: rows of QUERIES values, of each head D and D of its
// gate; keys: rows of KEYS values, the heads from FIRST on. cos, sin: SAME rows for all sequences or not.
// Squares: each thread its own, 32 apart, in order, then simd_sum.
const int lane = thread_index_in_simdgroup;
const uint number = threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup;
const size_t row = number / (HQ + HKV);
const int head = number % (HQ + HKV);
const uint tokens = queries_shape[1];  // no constant: a kernel for each length of a prompt would be compiled
if (row < queries_shape[0] * tokens) {  // the same for all threads of a SIMD group
  const bool query = head < HQ;
  const size_t from = query ? row * QUERIES + head * 2 * D : row * KEYS + FIRST + (head - HQ) * D;
  const size_t batch = number / (HQ + HKV) / tokens, t = number / (HQ + HKV) % tokens;
  const size_t turn = ((SAME ? 0 : batch) * tokens + t) * HALF;
  float squares = 0.0f;
  for (int i = lane; i < D; i += 32) {
    const float value = query ? static_cast<float>(queries[from + i]) : static_cast<float>(keys[from + i]);
    squares += value * value;
  }
  const float scale = metal::precise::rsqrt(simd_sum(squares) / static_cast<float>(D) + eps[0]);
  for (int i = lane; i < D; i += 32) {
    // [ a | b | rest ] -> [ a cos - b sin | b cos + a sin | rest ]
    float value = query ? static_cast<float>(queries[from + i]) * static_cast<float>(q_norm[i])
                        : static_cast<float>(keys[from + i]) * static_cast<float>(k_norm[i]);
    if (i < 2 * HALF) {
      const int other = i < HALF ? i + HALF : i - HALF, angle = i < HALF ? i : i - HALF;
      const float beside = query ? static_cast<float>(queries[from + other]) * static_cast<float>(q_norm[other])
                                 : static_cast<float>(keys[from + other]) * static_cast<float>(k_norm[other]);
      value = value * cos[turn + angle] + (i < HALF ? -beside : beside) * sin[turn + angle];
    }
    const T result = static_cast<T>(value * scale);
    if (query) {
      turned_queries[((batch * HQ + head) * tokens + t) * D + i] = result;
      gates[(row * HQ + head) * D + i] = queries[from + D + i];
    } else {
      turned_keys[((batch * HKV + head - HQ) * tokens + t) * D + i] = result;
    }
  }
}
