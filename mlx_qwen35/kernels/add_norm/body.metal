// x + added, and the RMS norm of that. A threadgroup of SIMDS SIMD groups a row of H values; PER values a thread.
// The norm is that of the sum before it is rounded to T. Squares: each thread its own in order, then simd_sum, then SIMD
// group by SIMD group.
threadgroup float parts[SIMDS];
const int mine = thread_position_in_threadgroup.x, threads = SIMDS * 32;
const size_t start = static_cast<size_t>(threadgroup_position_in_grid.x) * H;  // of the row
float sums[PER];
float squares = 0.0f;
for (int n = 0; n < PER; ++n) {
  const int i = mine + n * threads;
  sums[n] = 0.0f;
  if (i < H) {
    sums[n] = static_cast<float>(x[start + i]) + static_cast<float>(added[start + i]);
    total[start + i] = static_cast<T>(sums[n]);
  }
  squares += sums[n] * sums[n];
}
squares = simd_sum(squares);
if (thread_index_in_simdgroup == 0) {
  parts[simdgroup_index_in_threadgroup] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
squares = 0.0f;
for (int s = 0; s < SIMDS; ++s) {
  squares += parts[s];
}
const float scale = metal::precise::rsqrt(squares / static_cast<float>(H) + eps[0]);
for (int n = 0; n < PER; ++n) {
  const int i = mine + n * threads;
  if (i < H) {
    normed[start + i] = static_cast<T>(sums[n] * scale * static_cast<float>(weight[i]));
  }
}
