#!/usr/bin/env bash
# Version: mlx 0.32.4
# One would guess: global_scale of mx.quantize and mx.dequantize in mode nvfp4 is the factor that NVFP4 checkpoints hold beside
#   their scales: the largest weight by 6 x 448.
# What happens: It is that largest weight itself. With the factor from a file, which is 2,688 times smaller, nearly all
#   weights become zero, and nothing is said.
# Seen:
#     without: relative error 0.095
#     the largest weight: relative error 0.093
#     the largest weight by 6 x 448: relative error 0.999
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

w = mx.random.normal((4, 64), key=mx.random.key(0))
largest = mx.abs(w).max()
found = []
for name, scale in (("without", None), ("the largest weight", largest), ("the largest weight by 6 x 448", largest / 2688)):
    more = {} if scale is None else {"global_scale": scale}
    parts = mx.quantize(w, 16, 4, mode="nvfp4", **more)
    back = mx.dequantize(*parts, group_size=16, bits=4, mode="nvfp4", **more)
    found.append((mx.linalg.norm(back - w) / mx.linalg.norm(w)).item())
    print(f"{name}: relative error {found[-1]:.3f}")
assert found[0] < 0.2 and found[1] < 0.2 and found[2] > 0.9
PYTHON
