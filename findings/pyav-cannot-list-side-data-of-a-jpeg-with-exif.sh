#!/usr/bin/env bash
# Version: av 18.1.0, pictures written by pillow 13.0.0
# One would guess: frame.side_data of a decoded picture can be looked at: it lists what PyAV knows, and leaves out what not.
# What happens: A JPEG with EXIF has side data of a kind that PyAV's own list of kinds lacks, and touching side_data at all
#   raises. So nearly every photograph of a telephone does, and programs that look for motion vectors or a display
#   matrix in all they read. frame.rotation, which comes of the display matrix, works.
# Seen:
#     without EXIF: 0 entries
#     with EXIF: 31 is not a valid Type
#     rotation: -90
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

def decoded(**options):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(file, "JPEG", **options)
    file.seek(0)
    with av.open(file) as container:
        return next(container.decode(video=0))

plain = len(decoded().side_data)
print("without EXIF:", plain, "entries")
exif = Image.Exif()
exif[0x0112] = 6
frame = decoded(exif=exif.tobytes())
try:
    frame.side_data
    raise SystemExit("it can be looked at")
except ValueError as error:
    print("with EXIF:", error)
    assert "is not a valid Type" in str(error)
print("rotation:", frame.rotation)
assert plain == 0 and frame.rotation == -90
PYTHON
