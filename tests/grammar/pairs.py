"""One random schema, one random model, one answer, and what jsonschema says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator, ValidationError

from mlx_qwen35.errors import ArgumentError, GrammarError
from mlx_qwen35.grammar import Grammar
from mlx_qwen35.processor import Processor
from mlx_qwen35.text.reply import parse_reply
from tests.grammar.schemas import Schemas
from tests.grammar.walks import Walk, walk

_CHOICES: tuple[dict[str, Any], ...] = ({"tool_choice": "required"}, {"strict": True}, {"tool_choice": "tool_0"})


@dataclass(frozen=True)
class Result:
    """fault: what is wrong, "" where nothing is; refused: the schema was, by name; calls: those read in the answer."""

    ended: bool = False
    refused: str = ""
    fault: str = ""
    calls: int = 0


def answered(processor: Processor, seed: int) -> Result:
    """An answer by a random schema."""
    schema = Schemas(seed).schema()

    def fault(answer: Walk) -> str:
        """Of an answer that is called complete, ended or not."""
        try:
            _validate(json.loads(processor.decode(answer.tokens)), schema)
        except (ValueError, ValidationError) as error:
            return f"seed {seed}: {str(error).splitlines()[0]}"
        return ""

    return _result(processor, seed, {"response_format": schema}, fault)


def called(processor: Processor, seed: int) -> Result:
    """An answer with random tools."""
    tools = Schemas(seed).tools()
    functions = [tool.get("function", tool) for tool in tools]
    schemas = {function["name"]: function["parameters"] for function in functions}
    options = _CHOICES[seed % len(_CHOICES)]
    count = 0

    def fault(answer: Walk) -> str:
        nonlocal count
        text = processor.decode(answer.tokens)
        reply = parse_reply(text, tools=tools)
        count = len(reply.tool_calls)
        if reply.incomplete_call or text.count("<tool_call>") != count or (not count and "strict" not in options):
            return f"seed {seed}: a call was not read"
        try:
            for call in reply.tool_calls:
                _validate(call.arguments, schemas[call.name])
        except ValidationError as error:
            return f"seed {seed}: {str(error).splitlines()[0]}"
        return ""

    result = _result(processor, seed, {"tools": tools, **options}, fault)
    return Result(result.ended, result.refused, result.fault, count)


def _result(processor: Processor, seed: int, options: dict[str, Any], fault: Any) -> Result:
    generator = np.random.default_rng(seed)
    try:
        grammar = Grammar.of(processor, **options)
        answer = walk(
            processor, grammar.matcher(thinking=False), generator, most=400, leaning=generator.uniform(0.2, 0.6)
        )
    except ArgumentError as error:
        return Result(refused=str(error))
    except GrammarError as error:
        return Result(fault=f"seed {seed}: {error}")
    if answer.ended and not answer.complete:
        return Result(True, fault=f"seed {seed}: it ended incomplete")
    return Result(answer.ended, fault=fault(answer) if answer.complete else "")


def _validate(value: Any, schema: Any) -> None:
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(value)
