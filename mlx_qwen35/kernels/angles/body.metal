// cos, sin [B, T, HALF] of position * rate, times factor: a thread each pair. positions [B, T], or where there are SEVERAL
// [3, B, T], of which axes says whose turns a pair.
const size_t each = thread_position_in_grid.x;
const size_t tokens = SEVERAL ? static_cast<size_t>(positions_shape[1]) * positions_shape[2]
                              : static_cast<size_t>(positions_shape[0]) * positions_shape[1];
if (each < tokens * HALF) {
  const size_t token = each / HALF;
  const int pair = each % HALF;
  const size_t from = SEVERAL ? static_cast<size_t>(axes[pair]) * tokens + token : token;
  const float angle = static_cast<float>(positions[from]) * rates[pair];
  cos[each] = metal::precise::cos(angle) * factor[0];
  sin[each] = metal::precise::sin(angle) * factor[0];
}
