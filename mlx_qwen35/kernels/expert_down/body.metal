// hidden [N, K, I], ids [N, K], weights [N, K + 1], shared_hidden [N, J] -> out [N, H]: the sum over K of weight * down
// of the expert, plus the last weight * down of the shared one.
//
// A SIMD group makes ROWS values of one row. Thread t goes through the K experts in the order of ids and then the shared
// one, of each it adds blocks t, t + 32, ... of 16 values in their order and counts the sum by the expert's weight;
// simd_sum adds the threads, once. N and where an expert's weights lie change no bits.
const int ROWS = 4;
uint lane = thread_index_in_simdgroup;
uint first = (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
size_t row = threadgroup_position_in_grid.y;
if (first < H) {  // the same for all threads of a SIMD group
  float sums[ROWS], values[BLOCK];
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = 0.0f;
  }
  for (uint slot = 0; slot <= K; ++slot) {
    float parts[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      parts[r] = 0.0f;
    }
    if (slot < K) {
      size_t start = static_cast<size_t>(ids[row * K + slot]) * H;
      for (uint block = lane; block < I / BLOCK; block += 32) {
        float total = load_block(values, hidden + (row * K + slot) * I + block * BLOCK);
        for (int r = 0; r < ROWS; ++r) {
          // Behind the last row it is taken again, and what comes of it is not written.
          size_t at = (start + metal::min(first + r, static_cast<uint>(H - 1))) * (I / BLOCK) + block;
          parts[r] += Form<DOWN_FORM>::template dot<DOWN_GROUP>(values, total, down, down_scales, down_biases, at);
        }
      }
    } else {
      for (uint block = lane; block < J / BLOCK; block += 32) {
        float total = load_block(values, shared_hidden + row * J + block * BLOCK);
        for (int r = 0; r < ROWS; ++r) {
          size_t at = static_cast<size_t>(metal::min(first + r, static_cast<uint>(H - 1))) * (J / BLOCK) + block;
          parts[r] += Form<SHARED_DOWN_FORM>::template dot<SHARED_DOWN_GROUP>(
              values, total, shared_down, shared_down_scales, shared_down_biases, at);
        }
      }
    }
    float weight = static_cast<float>(weights[row * (K + 1) + slot]);
    for (int r = 0; r < ROWS; ++r) {
      sums[r] += weight * parts[r];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float sum = simd_sum(sums[r]);
    if (lane == 0 && first + r < H) {
      out[row * H + first + r] = static_cast<T>(sum);
    }
  }
}
