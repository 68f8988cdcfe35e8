#!/usr/bin/env bash
# Version: pillow-heif 1.8.1 with pillow 13.0.0
# One would guess: A picture that its EXIF asks to be turned is read lying, with the tag, whichever format it has; who needs it
#   upright turns it.
# What happens: From HEIC it comes upright, its size exchanged and the tag set to 1; the tag that was there is in
#   info["original_orientation"]. Boxes or sizes that were measured on the JPEG of the same photo lie elsewhere.
# Seen:
#     JPEG: (96, 64), orientation 6
#     HEIC: (64, 96), orientation 1, original 6
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check pillow-heif==1.8.1 pillow==13.0.0
cd "$folder"
env/bin/python - <<'PYTHON'
import io
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
picture = Image.new("RGB", (96, 64), "red")
tags = picture.getexif()
tags[0x0112] = 6
found = {}
for form in ("JPEG", "HEIF"):
    file = io.BytesIO()
    picture.save(file, form, exif=tags.tobytes())
    read = Image.open(file)
    found[form] = (read.size, read.getexif().get(0x0112), read.info.get("original_orientation"))
print(f"JPEG: {found['JPEG'][0]}, orientation {found['JPEG'][1]}")
print(f"HEIC: {found['HEIF'][0]}, orientation {found['HEIF'][1]}, original {found['HEIF'][2]}")
assert found == {"JPEG": ((96, 64), 6, None), "HEIF": ((64, 96), 1, 6)}
PYTHON
