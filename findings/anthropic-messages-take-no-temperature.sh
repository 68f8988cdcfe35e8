#!/usr/bin/env bash
# Version: anthropic 2.14.0 (its Python client)
# One would guess: messages.create takes temperature, top_p and top_k, which servers of its interface read.
# What happens: It has no such arguments any more, and raises TypeError before anything is sent; extra_body={"temperature": 0} puts
#   the field into the body.
# Seen:
#     arguments of that name: []
#     temperature=0: TypeError
#     extra_body={"temperature": 0} as it is sent: 0
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check anthropic==2.14.0
cd "$folder"
env/bin/python - <<'PYTHON'
import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import anthropic

got = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        told = json.dumps({
            "id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": "end_turn",
            "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1},
        }).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *words):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(api_key="x", base_url=f"http://127.0.0.1:{server.server_port}", timeout=20, max_retries=0)
asked = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Is it?"}]}
names = sorted({"temperature", "top_p", "top_k"} & set(inspect.signature(client.messages.create).parameters))
try:
    client.messages.create(**asked, temperature=0)
    error = "none"
except TypeError:
    error = "TypeError"
before = len(got)
client.messages.create(**asked, extra_body={"temperature": 0})
server.shutdown()
print("arguments of that name:", names)
print("temperature=0:", error)
print('extra_body={"temperature": 0} as it is sent:', got[-1]["temperature"])
assert names == [] and error == "TypeError" and before == 0 and got[-1]["temperature"] == 0
PYTHON
