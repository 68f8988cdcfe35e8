// The patient of test_mutants.py: sums of rows and of twice the rows, two rounds through the same threadgroup memory.
// x [R, N] -> out [R, 2]. A threadgroup of THREADS a row.
threadgroup float parts[32];
uint mine = thread_position_in_threadgroup.x;
uint row = threadgroup_position_in_grid.x;
for (int round = 0; round < 2; ++round) {
  float sum = 0.0f;
  for (uint i = mine; i < N; i += THREADS) {
    sum += static_cast<float>(x[row * N + i]) * static_cast<float>(round + 1);
  }
  sum = simd_sum(sum);
  if (thread_index_in_simdgroup == 0) {
    parts[simdgroup_index_in_threadgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // written
  float total = 0.0f;
  for (int s = 0; s < THREADS / 32; ++s) {
    total += parts[s];
  }
  if (mine == 0) {
    out[row * 2 + round] = static_cast<T>(total);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // read
}
