#!/usr/bin/env bash
# Version: gguf 0.19.0 (gguf.quants.quantize, dequantize), NumPy 2.3.5
# One would guess: Q8_0 takes each weight to within half a step, 0.4 % of the largest of its 32, however small they all are: its
#   scale is a float, and a block of small weights has a small scale.
# What happens: The scale is a float16, whose smallest step is 6e-8. Blocks whose largest weight is below 3.7e-6 become zeros, and
#   those below some 1e-4 are all off by the same part, up to a third, without a word. Q4_0, with a sixteenth of the codes, keeps a
#   block of 1e-6 (its scale is 16 times as large); BF16 keeps all.
# Seen (largest error of a block over its largest weight):
#     largest weight 1e-03: Q8_0 0.0046, Q4_0 0.1245
#     largest weight 1e-05: Q8_0 0.2446, Q4_0 0.1237
#     largest weight 6e-06: Q8_0 0.2650, Q4_0 0.0959
#     largest weight 1e-06: Q8_0 1.0000, Q4_0 0.1654
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.3.5
cd "$folder"
env/bin/python - <<'PYTHON'
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

weights = np.random.default_rng(0).uniform(-1, 1, (64, 32)).astype(np.float32)
weights /= np.abs(weights).max(1, keepdims=True)
found = {}
for largest in (1e-3, 1e-5, 6e-6, 1e-6):
    scaled = weights * np.float32(largest)
    for kind in ("Q8_0", "Q4_0"):
        back = dequantize(quantize(scaled, Type[kind]), Type[kind])
        found[largest, kind] = float(np.abs(back - scaled).max() / largest)
    print(f"largest weight {largest:.0e}: Q8_0 {found[largest, 'Q8_0']:.4f}, Q4_0 {found[largest, 'Q4_0']:.4f}")
assert found[1e-3, "Q8_0"] < 0.005 and found[1e-5, "Q8_0"] > 0.1 < found[6e-6, "Q8_0"] and found[1e-6, "Q8_0"] == 1
assert all(found[largest, "Q4_0"] < 0.2 for largest in (1e-3, 1e-5, 6e-6, 1e-6))
PYTHON
