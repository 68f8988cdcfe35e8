#!/usr/bin/env bash
# Version: av 18.1.0 (FFmpeg 8.1) with pillow 13.0.0
# One would guess: A file that av.open takes, and that has a video stream, can be decoded; or it is refused when it is opened.
# What happens: An animated WebP opens, with a stream of 0 x 0 pixels in one packet, and the first attempt to decode raises
#   InvalidDataError. Pillow reads its frames and times.
# Seen:
#     PyAV: a webp stream of 0 x 0, 1 packet with data
#     decoding: InvalidDataError
#     Pillow: 5 frames
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
pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], duration=100)
with av.open(io.BytesIO(file.getvalue())) as container:
    stream = container.streams.video[0]
    packets = sum(packet.size > 0 for packet in container.demux(stream))
    print(f"PyAV: a {stream.codec_context.name} stream of {stream.width} x {stream.height}, {packets} packet with data")
    assert (stream.width, stream.height, packets) == (0, 0, 1)
with av.open(io.BytesIO(file.getvalue())) as container:
    try:
        frames = len(list(container.decode(video=0)))
        raise SystemExit(f"{frames} frames were decoded")
    except av.error.InvalidDataError:
        print("decoding: InvalidDataError")
count = Image.open(file).n_frames
print(f"Pillow: {count} frames")
assert count == 5
PYTHON
