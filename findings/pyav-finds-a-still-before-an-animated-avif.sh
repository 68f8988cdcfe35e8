#!/usr/bin/env bash
# Version: av 18.1.0 with pillow 13.0.0
# One would guess: streams.video[0] of an animated picture is the animation.
# What happens: An animated AVIF holds a still as its first stream, of one frame, and the animation as its second.
#   streams.best("video") finds that.
# Seen:
#     frames by stream: [1, 5]
#     best: 1
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 pillow==13.0.0
cd "$folder"
env/bin/python - <<'PYTHON'
import io
import av
from PIL import Image

file = io.BytesIO()
pictures = [Image.new("RGB", (64, 48), (40 * number, 0, 0)) for number in range(5)]
pictures[0].save(file, "AVIF", save_all=True, append_images=pictures[1:], duration=100)
with av.open(io.BytesIO(file.getvalue())) as container:
    frames = [stream.frames for stream in container.streams.video]
    best = container.streams.best("video").index
print("frames by stream:", frames)
print("best:", best)
assert frames == [1, 5] and best == 1
PYTHON
