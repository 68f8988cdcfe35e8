"""What a form costs a token, beside a decode step, and whether 10,000 random models keep to 10,000 random schemas.

    python benchmarks/grammar.py [--pairs 10000] [--calls 3000] [--steps 12] [--layers 24] [--form ...] [--out FILE]

Cost: the mask, `advance` and the masked logits of each token of a fixed answer, at the 248,320 rows of the published
models, with the rebuilt tokenizer (tests/published.py); beside them a decode step of the 0.8B geometry with random
weights, on the default device. A mask is made by the CPU; on a GPU that is while the step before is computed.

Pairs: schemas and tools from tests/grammar/schemas.py, random logits under the demo's tokenizer; what ended has to
parse and to validate with jsonschema (formats included), and so has what the matcher calls complete before its end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.geometry import config, depth  # noqa: E402
from benchmarks.measuring import CHECKOUT, circumstances, write  # noqa: E402
from mlx_qwen35.cache import Cache  # noqa: E402
from mlx_qwen35.config import ModelConfig  # noqa: E402
from mlx_qwen35.grammar import Grammar  # noqa: E402
from mlx_qwen35.library import load_processor  # noqa: E402
from mlx_qwen35.model import Model  # noqa: E402
from mlx_qwen35.processor import Processor  # noqa: E402
from mlx_qwen35.sampling.masking import masked  # noqa: E402
from tests.grammar.pairs import Result, answered, called  # noqa: E402
from tests.published import write_published_files  # noqa: E402

CODE = '''
def area(shapes: list[dict[str, float]]) -> float:
    """The sum of all."""
    total = 0.0
    for shape in shapes:
        if shape["kind"] < 3 and shape.get("w") is not None:  # a box, not <none>
            total += shape["w"] * shape["h"]
        elif "r" in shape:
            total += 3.14159 * shape['r'] ** 2
    return total  # <b>done</b>
'''
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "string", "format": "date"},
        "tall": {"type": "number", "minimum": 0, "maximum": 3},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 200}},
        "kind": {"enum": ["writer", "painter", "both"]},
    },
    "required": ["name", "born", "tall", "words", "kind"],
    "additionalProperties": False,
}
_ANSWER = {"name": "Astrid Järvinen", "born": "1912-02-29", "tall": 1.74, "words": [CODE[:150]] * 3, "kind": "both"}
WRITE = {
    "name": "write_file",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "text": {"type": "string"}, "mode": {"type": "integer"}},
        "required": ["path", "text"],
    },
}
_CALL = (
    "<tool_call>\n<function=write_file>\n<parameter=path>\nsrc/area.py\n</parameter>\n<parameter=text>\n"
    f"{CODE}{CODE}\n</parameter>\n<parameter=mode>\n420\n</parameter>\n</function>\n</tool_call>"
)
_GBNF = r"""
root ::= value
value ::= object | array | string | "-"? [0-9]+ ("." [0-9]+)? | "true" | "false" | "null"
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}"
array ::= "[" ws (value ("," ws value)*)? "]"
string ::= "\"" ([^"\\\x00-\x1F] | "\\" ["\\/bfnrtu])* "\""
ws ::= " "?
"""
# What is asked, and an answer to it.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "a schema": ({"response_format": PERSON}, json.dumps(_ANSWER, ensure_ascii=False)),
    "any JSON": ({"response_format": "json"}, json.dumps(_ANSWER, ensure_ascii=False)),
    "a call": ({"tools": [WRITE], "tool_choice": "required"}, _CALL),
    "an expression": (
        {"response_format": {"type": "regex", "pattern": r"(\w+[ ,.]+){5,200}"}},
        "some words, and more. " * 20,
    ),
    "GBNF": ({"response_format": {"type": "gbnf", "grammar": _GBNF}}, json.dumps(_ANSWER, ensure_ascii=False)),
}  # fmt: skip


def costs(processor: Processor, names: Iterable[str], step: float) -> list[dict[str, Any]]:
    """A record for each form; step: seconds of a decode step."""
    records = []
    for name in names:
        options, text = FORMS[name]
        begin = time.perf_counter()
        grammar = Grammar.of(processor, **options)
        compiled = time.perf_counter() - begin
        times: dict[str, list[float]] = {"mask": [], "advance": [], "masked": []}
        matcher = grammar.matcher(thinking=False)
        logits = mx.random.normal((1, processor.config.text.vocab_size))
        mx.eval(logits, masked(logits, matcher.mask()))
        for token in processor.tokenizer.encode(text):
            words = _timed(times["mask"], matcher.mask)
            _timed(times["masked"], lambda: mx.eval(masked(logits, words)))  # noqa: B023
            _timed(times["advance"], lambda: matcher.advance(token))  # noqa: B023
        if not matcher.complete:
            raise SystemExit(f"the answer is not in its form: {name}")
        means = {key: 1e3 * statistics.mean(each) for key, each in times.items()}
        each = 1e3 * np.array(times["mask"])
        records.append(
            {
                "benchmark": "grammar",
                "form": name,
                "tokens": len(times["mask"]),
                "compile_ms": round(1e3 * compiled, 2),
                "mask_ms": {"mean": round(means["mask"], 4), "median": round(float(np.median(each)), 4)}
                | {"p95": round(float(np.quantile(each, 0.95)), 4), "max": round(float(each.max()), 4)},
                "advance_ms": round(means["advance"], 4),
                "masked_ms": round(means["masked"], 4),
                "step_ms": round(1e3 * step, 3),
                "share": round(sum(means.values()) / (1e3 * step), 5),
            }
        )
    return records


def decode_step(steps: int, layers: int) -> float:
    """Seconds of one decode step of the 0.8B geometry, the median."""
    model = Model(ModelConfig.from_dict(config("0.8B", layers)))
    kind = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    model.set_dtype(kind)
    mx.eval(model.parameters())
    cache: Cache = model.make_cache()
    mx.eval(model(mx.zeros((1, 32), mx.int32), cache))
    times: list[float] = []
    for _ in range(steps + 2):
        _timed(times, lambda: mx.eval(model(mx.zeros((1, 1), mx.int32), cache)))
    return statistics.median(times[2:])


def pairs(what: str, one: Callable[[Processor, int], Result], count: int) -> dict[str, Any]:
    """A record of so many pairs."""
    processor, begin = load_processor("demo"), time.perf_counter()
    counts: Counter[str] = Counter()
    faults, refusals = [], Counter[str]()
    for seed in range(count):
        result = one(processor, seed)
        counts["ended"] += result.ended
        counts["refused"] += bool(result.refused)
        counts["calls"] += result.calls
        refusals[result.refused] += bool(result.refused)
        if result.fault:
            faults.append(result.fault)
    took = round(time.perf_counter() - begin, 1)
    return {
        "benchmark": "grammar",
        "pairs": what,
        "count": count,
        **counts,
        "unfinished": count - counts["ended"] - counts["refused"],
        "faults": faults,
        "refusals": [text for text, times in refusals.most_common(5) if times],
        "seconds": took,
    }


def _timed(times: list[float], call: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    result = call()
    times.append(time.perf_counter() - begin)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=0, help="random schemas, and as many models (0)")
    parser.add_argument("--calls", type=int, default=0, help="random sets of tools (0)")
    parser.add_argument("--steps", type=int, default=12, help="decode steps that are timed (12); 0: no costs")
    parser.add_argument("--layers", type=int, default=depth("0.8B"), help="of the model (24)")
    parser.add_argument("--form", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    around, records = circumstances(), []
    if arguments.steps:
        data = CHECKOUT.parent / "shared/model_data"
        if not data.is_dir():
            raise SystemExit("the costs need the rebuilt tokenizer in ../shared/model_data; --steps 0 leaves them out")
        step = decode_step(arguments.steps, arguments.layers)
        with tempfile.TemporaryDirectory() as folder:
            processor = load_processor(write_published_files(data, Path(folder)))
        begin = time.perf_counter()
        Grammar.of(processor, response_format="json")
        made = time.perf_counter() - begin
        records += [{**record, "vocabulary_s": round(made, 2)} for record in costs(processor, arguments.form, step)]
    if arguments.pairs:
        records.append(pairs("schemas", answered, arguments.pairs))
    if arguments.calls:
        records.append(pairs("tools", called, arguments.calls))
    write(records, around, arguments.out)


if __name__ == "__main__":
    main()
