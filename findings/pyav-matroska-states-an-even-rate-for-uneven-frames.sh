#!/usr/bin/env bash
# Version: av 18.1.0
# One would guess: average_rate is the number of frames by the time they take; a file in another container with the same frames
#   has the same.
# What happens: 22 frames in 10.4 seconds, as a recording of a screen has them, are 30 a second by a Matroska file, which
#   repeats what the encoder was told, and 1.8 by an mp4. Times counted from it are off by a factor of fourteen;
#   those of the frames are right in both.
# Seen:
#     matroska: 30 frames a second stated, the last frame at 10.37 s
#     mp4: 1.78 frames a second stated, the last frame at 10.37 s
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

times = [float(n) for n in range(10)] + [10 + n / 30 for n in range(12)]
stated = {}
for form, tick in (("matroska", 1000), ("mp4", 90000)):
    with av.open(io.BytesIO(film(times, form, tick))) as container:
        stream = container.streams.video[0]
        stated[form] = float(stream.average_rate)
        last = max(frame.time for frame in container.decode(stream))
    print(f"{form}: {stated[form]:.3g} frames a second stated, the last frame at {last:.2f} s")
    assert abs(last - times[-1]) < 0.01
assert stated["matroska"] == 30 and stated["mp4"] < 2
PYTHON
