// One query of each of some rows, over keys and values that lie in pieces in several arrays k0, v0, k1, v1, ... of
// [rows, HKV, capacity, D]. A threadgroup has SPAN positions of one row (an item of the table) and one head of keys, for
// all GROUP heads of queries that share it: HEADS of them a SIMD group, PARTS times, and the span dealt out to SPLITS SIMD
// groups of each part, BLOCK positions in turn. So keys are read once for HEADS queries.
//
// table: how many rows; of each: its first item, which of the row's spans that is, whose query, its first piece, how many
// positions it has; then the pieces: which array, the position of the row behind its last, its capacity, the first head
// of its row, and what to add to a position of the row to have that in the array. items: see above.
//
// Sums are in float, with a maximum that goes up as keys come (m, l, o as in layers/stretches.py, powers of 2). Dot
// products: each thread its COLUMNS neighbours in order, then simd_sum. Positions of a SIMD group in their order, then SIMD
// groups in order, then spans (sum.metal). All of this depends on how many positions the row has, and neither on where
// they lie nor on other rows.
// WHOLE: no row has more than one span, so that `made` has the results [rows, HQ, D]; else what is to be put together:
// made [items, HQ, D] in float, and ends [items, HQ, 2]: the maximum, and the sum.
threadgroup float shown[PARTS * SPLITS * D];
threadgroup float highest[PARTS * SPLITS * HEADS];
threadgroup float totals[PARTS * SPLITS * HEADS];
const float LEAST = -1e30f;  // finite, so that no difference is NaN
const int mine = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup, part = simd / SPLITS, split = simd % SPLITS;
const int kv_head = threadgroup_position_in_grid.x, item = threadgroup_position_in_grid.y;

const int rows = table[0];
int row = 0;
while (row + 1 < rows && table[1 + (row + 1) * 5] <= item) {
  ++row;
}
const int about = 1 + row * 5;
const int begin = (item - table[about] + table[about + 1]) * SPAN;
const int end = metal::min(begin + SPAN, static_cast<int>(table[about + 4]));
const size_t asking = table[about + 2];
int piece = 1 + rows * 5 + table[about + 3] * 5;

float q[HEADS][COLUMNS], sums[HEADS][COLUMNS], most[HEADS], total[HEADS];
const float scale = metal::precise::rsqrt(static_cast<float>(D)) * 1.44269504f;  // log2(e)
#pragma unroll
for (int r = 0; r < HEADS; ++r) {
  const int head = metal::min(part * HEADS + r, GROUP - 1);  // behind the last it is taken again, and not written
  load_columns<COLUMNS, D, false>(q[r], queries + (asking * HQ + kv_head * GROUP + head) * D, lane);
  most[r] = LEAST;
  total[r] = 0.0f;
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    q[r][c] *= scale;
    sums[r][c] = 0.0f;
  }
}

for (int first = begin + split * BLOCK; first < end; first += SPLITS * BLOCK) {
  float scores[HEADS][BLOCK], values[BLOCK][COLUMNS];
  #pragma unroll
  for (int b = 0; b < BLOCK; ++b) {
    const int position = metal::min(first + b, end - 1);  // the same
    while (position >= table[piece + 1]) {
      piece += 5;
    }
    const int which = table[piece];
    const int at = (table[piece + 3] + kv_head) * table[piece + 2] + table[piece + 4] + position;
    const size_t place = static_cast<size_t>(at) * D;
    float keys[COLUMNS];
    load_columns<COLUMNS, D, WIDE>(
        keys, nth(which, k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12) + place, lane);
    load_columns<COLUMNS, D, WIDE>(
        values[b], nth(which, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12) + place, lane);
    #pragma unroll
    for (int r = 0; r < HEADS; ++r) {
      float score = 0.0f;
      #pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        score += q[r][c] * keys[c];
      }
      score = simd_sum(score);
      scores[r][b] = first + b < end ? score : LEAST;
    }
  }
  #pragma unroll
  for (int r = 0; r < HEADS; ++r) {
    float higher = most[r];
    #pragma unroll
    for (int b = 0; b < BLOCK; ++b) {
      higher = metal::max(higher, scores[r][b]);
    }
    const float fade = metal::fast::exp2(most[r] - higher);
    most[r] = higher;
    total[r] *= fade;
    #pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      sums[r][c] *= fade;
    }
    #pragma unroll
    for (int b = 0; b < BLOCK; ++b) {
      const float share = metal::fast::exp2(scores[r][b] - higher);
      total[r] += share;
      #pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        sums[r][c] += share * values[b][c];
      }
    }
  }
}

if (lane == 0) {
  #pragma unroll
  for (int r = 0; r < HEADS; ++r) {
    highest[simd * HEADS + r] = most[r];
    totals[simd * HEADS + r] = total[r];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
for (int r = 0; r < HEADS; ++r) {
  float top = LEAST;
  for (int s = 0; s < SPLITS; ++s) {
    top = metal::max(top, highest[(part * SPLITS + s) * HEADS + r]);
  }
  const float fade = metal::fast::exp2(most[r] - top);
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int column = lane * COLUMNS + c;
    if (column < D) {
      shown[simd * D + column] = sums[r][c] * fade;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // shown is there
  for (int i = mine; i < PARTS * D; i += PARTS * SPLITS * 32) {
    const int of = i / D, column = i % D, head = of * HEADS + r;
    if (head < GROUP) {
      float peak = LEAST, sum = 0.0f, all = 0.0f;
      for (int s = of * SPLITS; s < (of + 1) * SPLITS; ++s) {
        peak = metal::max(peak, highest[s * HEADS + r]);
      }
      for (int s = of * SPLITS; s < (of + 1) * SPLITS; ++s) {
        all += totals[s * HEADS + r] * metal::fast::exp2(highest[s * HEADS + r] - peak);
        sum += shown[s * D + column];
      }
      const size_t to = static_cast<size_t>(item) * HQ + kv_head * GROUP + head;
      made[to * D + column] = static_cast<OUT>(WHOLE ? sum / all : sum);
      if (column == 0) {
        ends[to * 2] = peak;
        ends[to * 2 + 1] = all;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // shown was read
}
