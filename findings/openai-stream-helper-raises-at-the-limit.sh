#!/usr/bin/env bash
# Version: openai 3.57.0 (its Python client), chat.completions.stream
# One would guess: An answer that max_tokens ended has finish_reason "length", from the helper .stream() as from
#   create(stream=True); the error for answers that cannot be parsed is for those who asked for a format. What a delta says
#   again stays the same.
# What happens: get_final_completion raises LengthFinishReasonError, for plain text too: the answer that was streamed cannot be had
#   whole. The helper adds up every text of a tool call but its type: a server that repeats id and name in each delta has them
#   doubled. And it keeps the usage of the last chunk alone: of one that came earlier, nothing is left.
# Seen:
#     create(stream=True): half an a|length
#     .stream(): half an a|LengthFinishReasonError
#     id "call_1" and name "look" in two deltas: call_1call_1, looklook
#     usage in the first chunk of two: None
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
cd "$folder"
env/bin/python - <<'PYTHON'
import json
import httpx2
import openai

def client(*choices, usage=None):
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks = [{**head, "choices": [{"index": 0, "finish_reason": None, **choice}]} for choice in choices]
    chunks[0]["usage"] = usage
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    answer = lambda request: httpx2.Response(200, headers={"content-type": "text/event-stream"}, text="".join(lines))
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="-", base_url="http://127.0.0.1/v1", http_client=http).chat.completions

asked = {"model": "m", "messages": [{"role": "user", "content": "tell"}], "max_tokens": 3}
cut = client({"delta": {"role": "assistant", "content": "half an a"}}, {"delta": {}, "finish_reason": "length"})
parts = [chunk.choices[0] for chunk in cut.create(stream=True, **asked)]
plain = "".join(part.delta.content or "" for part in parts) + "|" + parts[-1].finish_reason
print("create(stream=True):", plain)
helped = ""
try:
    with cut.stream(**asked) as stream:
        for event in stream:
            helped += event.delta if event.type == "content.delta" else ""
        stream.get_final_completion()
except openai.LengthFinishReasonError as error:
    helped += "|" + type(error).__name__
print(".stream():", helped)
call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
again = {"delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
twice = client({"delta": {"role": "assistant", "tool_calls": [call]}}, again, usage=usage)
with twice.stream(**asked) as stream:
    final = stream.get_final_completion()
[made] = final.choices[0].message.tool_calls
print(f'id "call_1" and name "look" in two deltas: {made.id}, {made.function.name}')
print("usage in the first chunk of two:", final.usage)
assert plain == "half an a|length" and helped == "half an a|LengthFinishReasonError"
assert (made.id, made.function.name, final.usage) == ("call_1call_1", "looklook", None)
PYTHON
