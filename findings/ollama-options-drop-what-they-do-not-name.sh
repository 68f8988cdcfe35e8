#!/usr/bin/env bash
# Version: ollama 0.6.3 (its Python client)
# One would guess: Options, which has top_k and top_p, carries min_p to the server, or refuses it.
# What happens: It is a model that ignores what it does not name: Options(min_p=0.1) is made without a word, and is empty when it is
#   sent. A plain dict in its place is sent as it is.
# Seen:
#     Options(top_p=0.5, min_p=0.1) as it is sent: {'top_p': 0.5}
#     a dict as it is sent: {'top_p': 0.5, 'min_p': 0.1}
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check ollama==0.6.3
cd "$folder"
env/bin/python - <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import ollama

got = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["options"])
        told = json.dumps({"model": "m", "message": {"role": "assistant", "content": "yes"}, "done": True}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *words):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = ollama.Client(f"http://127.0.0.1:{server.server_port}", timeout=20)
for options in (ollama.Options(top_p=0.5, min_p=0.1), {"top_p": 0.5, "min_p": 0.1}):
    client.chat("m", [{"role": "user", "content": "Is it?"}], options=options)
server.shutdown()
print("Options(top_p=0.5, min_p=0.1) as it is sent:", got[0])
print("a dict as it is sent:", got[1])
assert got == [{"top_p": 0.5}, {"top_p": 0.5, "min_p": 0.1}]
PYTHON
