// x, added [N, H] -> total = x + added (x where nothing is ADDED), normed = the RMS norm of total times weight, and
// made [N, O], that norm through a matrix gate [O, H]; where there are two (GATED) silu(gate normed) * (up normed).
//
// A SIMD group makes EACH values of up to MANY rows. The norm's factor is multiplied last: what meets the matrix is the
// sum, before it is rounded to T, times weight. Products and squares: thread t adds blocks t, t + 32, ... of 16 values, in
// their order; simd_sum adds the threads. N, O and MANY change no bits.
const int EACH = 4;
const uint lane = thread_index_in_simdgroup;
const uint outputs = gate_shape[0], rows = x_shape[0];
const uint group = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
const uint first = group * EACH;
const size_t from = static_cast<size_t>(threadgroup_position_in_grid.y) * MANY;
if (first < outputs) {  // the same for all threads of a SIMD group
  const uint count = metal::min(static_cast<uint>(MANY), static_cast<uint>(rows - from));
  float gates[MANY][EACH], ups[MANY][EACH], squares[MANY], values[BLOCK];
  for (int n = 0; n < MANY; ++n) {
    squares[n] = 0.0f;
    for (int r = 0; r < EACH; ++r) {
      gates[n][r] = 0.0f;
      ups[n][r] = 0.0f;
    }
  }
  for (uint block = lane; block < H / BLOCK; block += 32) {
#pragma unroll
    for (int n = 0; n < MANY; ++n) {
      if (static_cast<uint>(n) < count) {
        float sum = 0.0f;
        for (int i = 0; i < BLOCK; ++i) {
          const size_t at = (from + n) * H + block * BLOCK + i;
          float value = static_cast<float>(x[at]);
          if (ADDED) {
            value += static_cast<float>(added[at]);
          }
          squares[n] += value * value;
          values[i] = value * static_cast<float>(weight[block * BLOCK + i]);
          sum += values[i];
        }
        for (int r = 0; r < EACH; ++r) {
          // Behind the last output it is taken again, and what comes of it is not written.
          const size_t at = static_cast<size_t>(metal::min(first + r, outputs - 1)) * (H / BLOCK) + block;
          gates[n][r] += Form<GATE_FORM>::template dot<GATE_GROUP>(values, sum, gate, gate_scales, gate_biases, at);
          if (GATED) {
            ups[n][r] += Form<UP_FORM>::template dot<UP_GROUP>(values, sum, up, up_scales, up_biases, at);
          }
        }
      }
    }
  }
  const uint shares = (outputs + EACH - 1) / EACH;  // SIMD groups that share out total and normed
#pragma unroll
  for (int n = 0; n < MANY; ++n) {
    if (static_cast<uint>(n) < count) {
      const float scale = metal::precise::rsqrt(simd_sum(squares[n]) / static_cast<float>(H) + eps[0]);
      for (int r = 0; r < EACH; ++r) {
        float value = simd_sum(gates[n][r]) * scale;
        if (GATED) {
          value = value / (1.0f + metal::precise::exp(-value)) * (simd_sum(ups[n][r]) * scale);
        }
        if (lane == 0 && first + r < outputs) {
          made[(from + n) * outputs + first + r] = static_cast<T>(value);
        }
      }
      for (uint i = group * 32 + lane; i < H; i += shares * 32) {
        const size_t at = (from + n) * H + i;
        float value = static_cast<float>(x[at]);
        if (ADDED) {
          value += static_cast<float>(added[at]);
        }
        total[at] = static_cast<T>(value);
        normed[at] = static_cast<T>(value * scale * static_cast<float>(weight[i]));
      }
    }
  }
}
