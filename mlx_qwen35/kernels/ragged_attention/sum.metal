// What ragged_attention has of spans, made [items, HQ, D] and ends [items, HQ, 2] (maximum and sum), put together: out
// [rows, HQ, D]. A threadgroup has a head of a row, whose items are first[row] .. first[row + 1] - 1, taken in order.
const int mine = thread_position_in_threadgroup.x;
const int head = threadgroup_position_in_grid.x;
const size_t row = threadgroup_position_in_grid.y;
const int begin = first[row], end = first[row + 1];
float peak = -1e30f;
for (int item = begin; item < end; ++item) {
  peak = metal::max(peak, static_cast<float>(ends[(static_cast<size_t>(item) * HQ + head) * 2]));
}
for (int column = mine; column < D; column += THREADS) {
  float sum = 0.0f, all = 0.0f;
  for (int item = begin; item < end; ++item) {
    const size_t from = static_cast<size_t>(item) * HQ + head;
    const float share = metal::fast::exp2(ends[from * 2] - peak);
    all += share * ends[from * 2 + 1];
    sum += share * made[from * D + column];
  }
  out[(row * HQ + head) * D + column] = static_cast<T>(sum / all);
}
