"""Servers over HTTP: this package's beside mlx_lm.server and mlx_vlm.server, on the same checkpoint.

    python benchmarks/serving.py [--rounds 2] [--clients 8] [--prefix 1500] [--turns 20] [--tokens 64]
                                 [--part distinct shared agent] [--side ours mlx-lm mlx-vlm] [--out FILE]

The demo's weights in float32, which all three compute in on the CPU. Each side is a server of its own, started anew for
each part and round; they take turns. Requests are POST /v1/chat/completions with streaming, greedy, without thinking;
logit_bias keeps every answer at the length that is asked for.

    distinct    as many clients at once as --clients, prompts of about 180 tokens that have nothing in common
    shared      the same with a system message of --prefix tokens that all have in common
    agent       one client, --turns requests: a system message, tools, and a call and its result more each turn

"tokens/s": of all answers, from the first request to the last byte. "first": seconds from a request to its first
token, 95 % of the clients. "seconds": of all turns. Every request of a side is counted, and an answer of another
length, or an error, ends the run. Prints a table, and one JSON line a figure (or appends them to FILE), as
METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks.measuring import circumstances, compared, in_turns, spread, summary, write  # noqa: E402

SIDES = ("ours", "mlx-lm", "mlx-vlm")
PARTS = ("distinct", "shared", "agent")
WORDS = ("queen", "jacket", "violin", "stone", "kite", "owl", "lamp", "river")
STARTING = 180.0  # seconds that a server may take to answer
WAITING = 900.0  # seconds that a client waits for the next byte
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file, or some lines of it.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "first": {"type": "integer"}, "last": {"type": "integer"}},
            "required": ["path"],
        },
    },
}

Messages = list[dict[str, Any]]


class Server:
    """A server process of one side, from its first answer to its end."""

    def __init__(self, side: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        module = {"ours": "mlx_qwen35", "mlx-lm": "mlx_lm", "mlx-vlm": "mlx_vlm.server"}[side]
        command = [sys.executable, "-m", module, *{"ours": ["serve"], "mlx-lm": ["server"], "mlx-vlm": []}[side]]
        command += ["--model", str(folder), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--parallel", "8"] if side == "ours" else []
        self.side, self.model = side, str(folder)
        self._log = tempfile.TemporaryFile("w+")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment, cwd=CHECKOUT)

    def __enter__(self) -> Server:
        until = time.monotonic() + STARTING
        while time.monotonic() < until and self._process.poll() is None:
            try:
                self.chat([{"role": "user", "content": "What is 1 + 1?"}], 2)
                return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        self._log.seek(0)
        raise SystemExit(f"the server of {self.side} did not start:\n{self._log.read()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def chat(self, messages: Messages, tokens: int, tools: list[Any] | None = None) -> dict[str, Any]:
        """One answer of so many tokens. "first", "seconds": from the request on; "cached": tokens, None if not told."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): 100 for token in spoken()},
            "chat_template_kwargs": {"enable_thinking": False},
            "enable_thinking": False,
        } | ({"tools": tools} if tools else {})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAITING)
        begin, first, usage = time.perf_counter(), None, None
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.side} answers {response.status}: {response.read()[:500]!r}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                told = json.loads(line[6:])
                if "error" in told:
                    raise SystemExit(f"{self.side}: {told}")
                usage = told.get("usage") or usage
                delta = told["choices"][0]["delta"] if told.get("choices") else {}
                if first is None and (delta.get("content") or delta.get("reasoning")):
                    first = time.perf_counter() - begin
        finally:
            connection.close()
        seconds = time.perf_counter() - begin
        made = (usage or {}).get("completion_tokens", (usage or {}).get("output_tokens"))
        if first is None or made is not None and made != tokens:
            raise SystemExit(f"{self.side} gave {made} tokens where {tokens} were asked for, the first after {first} s")
        cached = ((usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens")
        return {"first": first, "seconds": seconds, "cached": cached}


@cache
def spoken() -> list[int]:
    """Two tokens of the demo that end no answer."""
    from mlx_qwen35.library import load_processor

    return load_processor(None).tokenizer.encode("7 5")[:3:2]


def words(count: int, seed: int) -> str:
    return " ".join(WORDS[(seed * 7 + n * n + n // (seed + 1)) % len(WORDS)] for n in range(count))


def distinct(count: int) -> list[Messages]:
    return [[{"role": "user", "content": f"{WORDS[n]} {n}: {words(140, n)}"}] for n in range(count)]


def shared(count: int, prefix: int) -> list[Messages]:
    from mlx_qwen35.library import load_processor

    processor, system = load_processor(None), "Rules."
    while len(processor.prompt("x", system=system).tokens) < prefix:
        system += f" Rule {len(system)}: say {WORDS[len(system) % len(WORDS)]}."
    return [
        [{"role": "system", "content": system}, {"role": "user", "content": f"What is {n + 20} + 25?"}]
        for n in range(count)
    ]


def together(server: Server, asked: list[Messages], tokens: int) -> dict[str, float]:
    """All at once. "tokens/s", and "first" of 95 % of the clients."""
    made: list[dict[str, Any] | BaseException] = [RuntimeError("no answer")] * len(asked)

    def client(number: int) -> None:
        try:
            made[number] = server.chat(asked[number], tokens)
        except BaseException as error:
            made[number] = error

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(asked))]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    for each in made:
        if isinstance(each, BaseException):
            raise each
    firsts = sorted(each["first"] for each in made)
    return {"tokens/s": len(asked) * tokens / seconds, "first": firsts[max(0, round(0.95 * len(firsts)) - 1)]}


def agent(server: Server, turns: int, tokens: int) -> dict[str, float]:
    """One turn after the other, each with what a tool gave to the call before."""
    messages = [
        {"role": "system", "content": "You edit files. " + words(120, 3)},
        {"role": "user", "content": f"Mend what is wrong. {words(20, 5)}"},
    ]
    begin = time.perf_counter()
    for turn in range(turns):
        server.chat(messages, tokens, [TOOL])
        call = {"name": "read_file", "arguments": json.dumps({"path": f"{WORDS[turn % 8]}.txt", "first": turn})}
        messages = messages + [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": f"c{turn}", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": f"c{turn}", "content": f"{turn}: {words(40, turn)}"},
        ]
    return {"seconds": time.perf_counter() - begin}


def checkpoint(folder: Path) -> Path:
    """The demo with its weights in float32: MLX's gathered product on the CPU takes nothing else."""
    import mlx.core as mx

    from mlx_qwen35.library import demo_folder
    from mlx_qwen35.machine.files import listed

    for file in listed(demo_folder(), "*"):
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        weights, told = mx.load(str(file), return_metadata=True)
        wide = {name: array.astype(mx.float32) for name, array in weights.items()}
        mx.save_safetensors(str(folder / file.name), wide, told)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1500)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    around = circumstances()
    work: dict[str, Callable[[Server], dict[str, float]]] = {
        "distinct": lambda server: together(server, distinct(args.clients), args.tokens),
        "shared": lambda server: together(server, shared(args.clients, args.prefix), args.tokens),
        "agent": lambda server: agent(server, args.turns, max(2, args.tokens // 4)),
    }
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoint(Path(place))
        for part in args.part:

            def side(name: str, part: str = part) -> dict[str, float]:
                with Server(name, folder) as server:
                    found = work[part](server)
                print(f"{part:9} {name:8} " + "  ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
                return found

            made = in_turns([lambda name=name: side(name) for name in args.side], args.rounds, warm=0)
            _tell(part, args, made, around)


def _tell(part: str, args: argparse.Namespace, made: list[tuple[dict[str, float], ...]], around: dict) -> None:
    for quantity in made[0][0]:
        each = {name: [turn[at][quantity] for turn in made] for at, name in enumerate(args.side)}
        for name, values in each.items():
            print(f"{part:9} {quantity:9} {name:8} {spread(summary(values), '8.2f')}")
        for name in args.side:
            if name != "ours" and "ours" in each:
                pairs = list(zip(each["ours"], each[name], strict=True))
                record = compared("serving", quantity, quantity, pairs, part=part, peer=name)
                print(f"{part:9} {quantity:9} {name} / ours: {spread(record['ratio'], '.2f')}")
                write([record], around, args.out)


if __name__ == "__main__":
    main()
