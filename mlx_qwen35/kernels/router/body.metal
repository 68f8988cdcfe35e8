// logits [N, E] -> ids [N, K], weights [N, K + SHARED]. A threadgroup a row: its first SIMD group chooses, the
// second finds how much the shared expert counts: sigmoid(x gate^T), x [N, WIDTH], gate [1, WIDTH].
//
// The largest logits are taken one after the other, of equal ones that of the lower id: ids come by weight, then by id.
// Weights are exp(logit - largest) divided by their sum, which is taken in this order. The dot product: thread t adds
// blocks t, t + 32, ... of 16 values, simd_sum adds the threads. A row with a NaN among its logits has NaN weights.
uint lane = thread_index_in_simdgroup;
size_t row = threadgroup_position_in_grid.x;
if (simdgroup_index_in_threadgroup == 0) {
  const int EACH = (E + 31) / 32;  // logits of a thread: number i is expert 32 i + lane
  const float LEAST = as_type<float>(0xff800000u);
  float logit[EACH];
  uint left = 0;  // bit i: number i can still be chosen
  uint missing = 0;
  for (int i = 0; i < EACH; ++i) {
    uint id = 32 * i + lane;
    logit[i] = LEAST;
    if (id < E) {
      float value = static_cast<float>(logits[row * E + id]);
      // Asked of the bits, so that no compiler may take NaN for impossible.
      if ((as_type<uint>(value) & 0x7fffffffu) > 0x7f800000u) {
        missing = 1;
      } else {
        logit[i] = value;
      }
      left |= 1u << i;
    }
  }
  float largest = 0.0f, sum = 0.0f, mine = 0.0f;
  uint my_id = 0;
  for (int k = 0; k < K; ++k) {
    float best = LEAST;
    uint best_id = E;
    for (int i = 0; i < EACH; ++i) {
      if (((left >> i) & 1u) && (best_id == E || logit[i] > best)) {
        best = logit[i];
        best_id = 32 * i + lane;
      }
    }
    float top = simd_max(best);
    uint id = simd_min(best == top ? best_id : static_cast<uint>(E));
    if (k == 0) {
      largest = top;
    }
    float weight = metal::precise::exp(top - largest);
    sum += weight;
    if (lane == k) {
      mine = weight;
      my_id = id;
    }
    if (id % 32 == lane) {
      left &= ~(1u << (id / 32));
    }
  }
  missing = simd_max(missing);
  if (lane < K) {
    ids[row * K + lane] = my_id;
    weights[row * (K + SHARED) + lane] = static_cast<TO>(missing ? as_type<float>(0x7fc00000u) : mine / sum);
  }
} else {
  float sum = 0.0f, values[BLOCK];
  for (uint block = lane; block < WIDTH / BLOCK; block += 32) {
    float total = load_block(values, x + row * WIDTH + block * BLOCK);
    sum += Form<GATE_FORM>::template dot<GATE_GROUP>(values, total, gate, gate_scales, gate_biases, block);
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    weights[row * (K + SHARED) + K] = static_cast<TO>(1.0f / (1.0f + metal::precise::exp(-sum)));
  }
}
