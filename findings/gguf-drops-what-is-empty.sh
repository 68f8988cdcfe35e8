#!/usr/bin/env bash
# Version: gguf 0.19.0 (GGUFWriter, GGUFReader)
# One would guess: A key that is written with an empty text or an empty list is in the file, with nothing in it: the format has
#   lengths for both, and "there, but empty" is not "not there".
# What happens: The key is left out without a word, and a reader that asks for it gets None, or its default. A list of lists
#   is written as such and comes back flat from field.contents().
# Seen:
#     add_string(""): key in the file False
#     add_array([]): key in the file False
#     add_array([[1, 2], [3]]): read as [1, 2, 3]
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0
cd "$folder"
env/bin/python - <<'PYTHON'
import gguf
import numpy as np

file = gguf.GGUFWriter("x.gguf", "test")
file.add_string("text", "")
file.add_array("list", [])
file.add_array("lists", [[1, 2], [3]])
file.add_tensor("w", np.ones(4, np.float32))
for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file):
    write()
file.close()
read = gguf.GGUFReader("x.gguf")
lists = read.fields["lists"].contents()
print(f'add_string(""): key in the file {"text" in read.fields}')
print(f'add_array([]): key in the file {"list" in read.fields}')
print(f"add_array([[1, 2], [3]]): read as {lists}")
assert not {"text", "list"} & set(read.fields) and lists == [1, 2, 3]
PYTHON
