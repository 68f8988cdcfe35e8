#!/usr/bin/env bash
# Version: anthropic 2.14.0 (its Python client), messages.stream
# One would guess: A tool call that max_tokens cut in the middle of its JSON is an error, or has its text as it came: an input that
#   is a dict was written whole.
# What happens: The half JSON is read as far as it goes and closed. What was cut is missing, or shorter: a number of which two
#   digits came is that number, a list ends early, a half string is left out with its name. In get_final_message the call
#   looks like any other; that stop_reason is max_tokens is the only sign.
# Seen (the model meant {"keep": 12345, "paths": ["/a", "/b"]}):
#     {"keep": 12 -> {'keep': 12}
#     {"keep": 12345, "pa -> {'keep': 12345}
#     {"keep": 12345, "paths": ["/a", "/b -> {'keep': 12345, 'paths': ['/a']}
#     stop_reason: max_tokens
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check anthropic==2.14.0
cd "$folder"
env/bin/python - <<'PYTHON'
import json
import anthropic
import httpx2

def final(written):
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
               "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
    call = {"type": "tool_use", "id": "t", "name": "clear", "input": {}}
    events = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": call},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": written}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens", "stop_sequence": None}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]
    text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    answer = lambda request: httpx2.Response(200, headers={"content-type": "text/event-stream"}, text=text)
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = anthropic.Anthropic(api_key="-", base_url="http://127.0.0.1", http_client=http)
    with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "clear up"}]) as stream:
        return stream.get_final_message()

cut = ['{"keep": 12', '{"keep": 12345, "pa', '{"keep": 12345, "paths": ["/a", "/b']
seen = [final(written) for written in cut]
for written, message in zip(cut, seen):
    print(f"{written} -> {message.content[0].input}")
print("stop_reason:", seen[0].stop_reason)
assert [message.content[0].input for message in seen] == [{"keep": 12}, {"keep": 12345}, {"keep": 12345, "paths": ["/a"]}]
PYTHON
