// A delta net between its projections, for some tokens: convolution, SiLU, unit length, decay, write strength,
// recurrence, gated norm. A threadgroup of SIMDS SIMD groups has one value head of one sequence. Its state [DV, DK] stays
// in registers, for which loops over it have to be unrolled: rows go to SIMD groups in turn, a row's columns to the 32
// threads, COLUMNS neighbours each.
// mixed: rows of MIXED values: q, k, v, z. gates: rows of GATES values, of which b begin at FIRST, then a.
// settings: eps of the norm, and whether windows and states are wanted after each token (1) or after the last (0).
// How many tokens there are, and what is wanted of them, are no constants: a token has the same bits alone and with
// others because the very same kernel computes it. Sums over columns: each thread its own in order, then simd_sum; the
// order does not depend on SIMDS either.
threadgroup float queries[DK];
threadgroup float keys[DK];
threadgroup float values[DV];
threadgroup float made[DV];
const int mine = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup, threads = SIMDS * 32;
const int head = threadgroup_position_in_grid.x;
const size_t batch = threadgroup_position_in_grid.y;
const int tokens = mixed_shape[1];
const bool each = settings[1] != 0.0f;
const int key_head = head / (HV / HK);
const int channels = 2 * HK * DK + HV * DV;
const bool first_of_key_head = head % (HV / HK) == 0;  // of the heads that read these keys, the one to write windows

float s[ROWS][COLUMNS];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  const int row = simd + r * SIMDS;
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int column = lane * COLUMNS + c;
    s[r][c] = row < DV && column < DK ? state[((batch * HV + head) * DV + row) * DK + column] : 0.0f;
  }
}
const float rate = metal::precise::exp(static_cast<float>(A_log[head]));

for (int t = 0; t < tokens; ++t) {
  const size_t token = batch * tokens + t;
  const bool wanted = each || t == tokens - 1;
  const size_t to = each ? token : batch;  // of windows and states
  for (int i = mine; i < 2 * DK + DV; i += threads) {
    const int channel = i < DK ? key_head * DK + i
                        : i < 2 * DK ? HK * DK + key_head * DK + i - DK
                                     : 2 * HK * DK + head * DV + i - 2 * DK;
    float u = 0.0f;
    for (int k = 0; k < TAPS; ++k) {
      const int at = t + k - (TAPS - 1);  // in mixed; before it, in the window
      T input;
      if (at < 0) {
        input = window[(batch * (TAPS - 1) + (at + TAPS - 1)) * channels + channel];
      } else {
        input = mixed[(batch * tokens + at) * MIXED + channel];
      }
      u += static_cast<float>(input) * static_cast<float>(taps[channel * TAPS + k]);
      if (k > 0 && wanted && (i >= 2 * DK || first_of_key_head)) {
        windows[(to * (TAPS - 1) + k - 1) * channels + channel] = input;
      }
    }
    const float active = u / (1.0f + metal::precise::exp(-u));
    if (i < DK) {
      queries[i] = active;
    } else if (i < 2 * DK) {
      keys[i - DK] = active;
    } else {
      values[i - 2 * DK] = active;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // queries, keys, values are there; made was read

  float q[COLUMNS], k[COLUMNS], of_q = 0.0f, of_k = 0.0f;
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int column = lane * COLUMNS + c;
    q[c] = column < DK ? queries[column] : 0.0f;
    k[c] = column < DK ? keys[column] : 0.0f;
    of_q += q[c] * q[c];
    of_k += k[c] * k[c];
  }
  const float scale_q = metal::precise::rsqrt((simd_sum(of_q) + 1e-6f) * static_cast<float>(DK));
  const float scale_k = metal::precise::rsqrt(simd_sum(of_k) + 1e-6f);
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    q[c] *= scale_q;
    k[c] *= scale_k;
  }
  const float a = static_cast<float>(gates[token * GATES + FIRST + HV + head]) + static_cast<float>(dt_bias[head]);
  const float softplus = metal::max(a, 0.0f) + metal::precise::log(1.0f + metal::precise::exp(-metal::abs(a)));
  const float decay = metal::precise::exp(-rate * softplus);
  const float beta = 1.0f / (1.0f + metal::precise::exp(-static_cast<float>(gates[token * GATES + FIRST + head])));

  #pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = simd + r * SIMDS;
    float known = 0.0f;
    #pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      s[r][c] *= decay;
      known += s[r][c] * k[c];
    }
    known = simd_sum(known);
    const float change = row < DV ? (values[row < DV ? row : 0] - known) * beta : 0.0f;
    float out = 0.0f;
    #pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      s[r][c] += change * k[c];
      out += s[r][c] * q[c];
    }
    out = simd_sum(out);
    if (row < DV && lane == 0) {
      made[row] = out;
    }
    if (row < DV && wanted) {
      #pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const int column = lane * COLUMNS + c;
        if (column < DK) {
          states[((to * HV + head) * DV + row) * DK + column] = s[r][c];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // made is there; queries, keys, values were read

  float squares = 0.0f;
  for (int i = lane; i < DV; i += 32) {
    squares += made[i] * made[i];
  }
  const float scale = metal::precise::rsqrt(simd_sum(squares) / static_cast<float>(DV) + settings[0]);
  for (int i = mine; i < DV; i += threads) {
    const float z = static_cast<float>(mixed[token * MIXED + channels + head * DV + i]);
    const float gate = z / (1.0f + metal::precise::exp(-z));
    y[token * HV * DV + head * DV + i] = static_cast<T>(made[i] * scale * static_cast<float>(norm[i]) * gate);
  }
}
