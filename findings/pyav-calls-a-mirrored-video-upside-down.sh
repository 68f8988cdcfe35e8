#!/usr/bin/env bash
# Version: av 18.1.0
# One would guess: frame.rotation says by how much a frame has to be turned, and 0 where it has not to be turned but mirrored.
# What happens: A display matrix that mirrors left and right (a = -1, d = 1: what a front camera writes) is reported as a
#   rotation of -180 degrees. Who turns by it stands the picture on its head, and it is still mirrored. The matrix
#   itself is in frame.side_data.
# Seen:
#     rotation: -180
#     matrix: a = -1, d = 1
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy
cd "$folder"
env/bin/python - <<'PYTHON'
import io
import struct
from fractions import Fraction
import av
import numpy as np

def film(times, form, tick=90000):
    file = io.BytesIO()
    with av.open(file, "w", format=form) as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, tick)
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.zeros((96, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * tick), Fraction(1, tick)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()

data = film([n / 30 for n in range(8)], "mov")
at = data.index(b"tkhd") + 44  # the matrix of the track header, ISO/IEC 14496-12
matrix = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
with av.open(io.BytesIO(data[:at] + matrix + data[at + 36 :])) as container:
    frame = next(container.decode(video=0))
    values = struct.unpack("=9i", bytes(frame.side_data.get("DISPLAYMATRIX")))
    print(f"rotation: {frame.rotation}")
    print(f"matrix: a = {values[0] // 65536}, d = {values[4] // 65536}")
    assert frame.rotation == -180 and values[0] == -65536 and values[4] == 65536
PYTHON
