// x [N, H], ids [N, K] -> hidden [N, K, I] and, of the shared expert, shared_hidden [N, J]: silu(gate x) * (up x).
//
// A SIMD group makes ROWS values of one row's slot; slot K is the shared expert. Thread t adds blocks t, t + 32, ... of
// 16 values, in their order; simd_sum adds the threads. N, K and where an expert's weights lie change no bits.
const int ROWS = 4;
uint lane = thread_index_in_simdgroup;
uint first = (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
uint slot = threadgroup_position_in_grid.y;
size_t row = threadgroup_position_in_grid.z;
uint rows = slot < K ? I : J;
if (first < rows) {  // the same for all threads of a SIMD group
  size_t start = slot < K ? static_cast<size_t>(ids[row * K + slot]) * I : 0;
  float gates[ROWS], ups[ROWS], values[BLOCK];
  for (int r = 0; r < ROWS; ++r) {
    gates[r] = 0.0f;
    ups[r] = 0.0f;
  }
  for (uint block = lane; block < H / BLOCK; block += 32) {
    float total = load_block(values, x + row * H + block * BLOCK);
    for (int r = 0; r < ROWS; ++r) {
      // Behind the last row it is taken again, and what comes of it is not written.
      size_t at = (start + metal::min(first + r, rows - 1)) * (H / BLOCK) + block;
      if (slot < K) {
        gates[r] += Form<GATE_FORM>::template dot<GATE_GROUP>(values, total, gate, gate_scales, gate_biases, at);
        ups[r] += Form<UP_FORM>::template dot<UP_GROUP>(values, total, up, up_scales, up_biases, at);
      } else {
        gates[r] += Form<SHARED_GATE_FORM>::template dot<SHARED_GATE_GROUP>(
            values, total, shared_gate, shared_gate_scales, shared_gate_biases, at);
        ups[r] += Form<SHARED_UP_FORM>::template dot<SHARED_UP_GROUP>(
            values, total, shared_up, shared_up_scales, shared_up_biases, at);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float g = simd_sum(gates[r]), u = simd_sum(ups[r]);
    if (lane == 0 && first + r < rows) {
      float h = g / (1.0f + metal::precise::exp(-g)) * u;
      if (slot < K) {
        hidden[(row * K + slot) * I + first + r] = static_cast<T>(h);
      } else {
        shared_hidden[row * J + first + r] = static_cast<T>(h);
      }
    }
  }
}
