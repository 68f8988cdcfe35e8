"""What OpenAI's interfaces have in common: fields of sampling and length, usage, errors, events, the list of models.

Knows their names for things. Knows neither messages nor the shape of any one answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_qwen35.engine.allowed import MOST_TOLD
from mlx_qwen35.serving.catalogue import Catalogue, Listed, Question, found
from mlx_qwen35.serving.exchange import Answering, Usage
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.refusal import Refusal

DONE = "data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have

_MOST_ANSWERS = 128
_SEEDS = 2**64
_TYPES = {
    "busy": ("rate_limit_error", "rate_limit_exceeded"),
    "broken": ("server_error", "internal_error"),
    "forbidden": ("invalid_request_error", "forbidden"),
    "invalid": ("invalid_request_error", None),
    "not_allowed": ("invalid_request_error", "method_not_allowed"),
    "not_found": ("invalid_request_error", "model_not_found"),
    "too_large": ("invalid_request_error", "request_too_large"),
    "too_long": ("invalid_request_error", "context_length_exceeded"),
    "unauthorized": ("invalid_request_error", "invalid_api_key"),
    "unavailable": ("server_error", "service_unavailable"),
}


def error(refusal: Refusal) -> dict[str, Any]:
    """The JSON of an error."""
    kind, code = _TYPES[refusal.kind]
    message, param = refusal.message, refusal.param
    if refusal.kind == "too_long":  # clients look for these words
        param = param or "messages"
        if refusal.most is not None and refusal.tokens is not None:
            message = (
                f"This model's maximum context length is {refusal.most} tokens. However, your messages resulted in "
                f"{refusal.tokens} tokens. Please reduce the length of the messages."
            )
    if code == "model_not_found" and param not in (None, "model"):
        code = "not_found"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event. Its text is ASCII, so that nothing in it is a line end to anybody."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def failed(wrong: BaseException) -> str:
    """What ends a stream in which something went wrong."""
    return event(error(Refusal.of(wrong))) + DONE


def usage(counted: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.answer_tokens,
        "total_tokens": counted.prompt_tokens + counted.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": counted.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
    }


def finish_reason(reason: str | None, *, calls: bool = False) -> str:
    """A Part's, in OpenAI's words; never None. calls: whether calls were given out."""
    if calls:
        return "tool_calls"
    return "length" if reason in ("length", "deadline") else "stop"


def read_sampling(fields: Fields) -> dict[str, Any]:
    """Fields of `Sampling` that a body has. Raises Refusal."""
    penalty = fields.number("repetition_penalty")
    other = fields.number("repeat_penalty")
    name = "repeat_penalty" if penalty is None else "repetition_penalty"
    penalty = other if penalty is None else penalty
    if penalty is not None and penalty <= 0:
        raise fields.refused(name, "a number above 0; 1 turns it off")
    top_p, seed = fields.number("top_p", 0, 1), fields.whole("seed", -(2**63), _SEEDS - 1)
    top_k = fields.whole("top_k", -1)
    given = {
        "temperature": fields.number("temperature", 0),
        "top_p": max(top_p, 1e-6) if top_p is not None else None,  # 0 is meant as: only the likeliest
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": fields.number("min_p", 0, 1),
        "seed": None if seed is None or seed == -1 else seed % _SEEDS,  # -1 is meant as: none
        "logit_bias": _bias(fields),
        "repetition_penalty": penalty,
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
    }
    return {name: value for name, value in given.items() if value is not None}


def _bias(fields: Fields) -> dict[int, float] | None:
    given = fields.any("logit_bias")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise fields.refused("logit_bias", 'an object of token ids with numbers, such as {"42": -100}')
    amounts = Fields(given, "logit_bias.")
    for name in given:
        if not name.isdecimal() or len(name) > 12:
            raise Refusal("invalid", f"logit_bias has a field {name[:40]!r}, which is no token id", "logit_bias")
    return {int(name): amounts.number(name, default=0.0) for name in given} or None


def read_limits(fields: Fields) -> dict[str, Any]:
    """Options that say how long and how many: max_tokens, stop, n. Without max_tokens nothing but the context is a
    limit. Raises Refusal."""
    newer, older = fields.whole("max_completion_tokens", -1), fields.whole("max_tokens", -1)
    most = older if newer is None else newer
    given = {
        "max_tokens": None if most == -1 else most,  # -1 is meant as: no limit
        "stop": [text for text in fields.strings("stop") if text] or None,
        "n": fields.whole("n", 1, _MOST_ANSWERS),
    }
    return {name: value for name, value in given.items() if value is not None}


def read_told(fields: Fields, name: str) -> int | None:
    """How many of the likeliest tokens are to be told."""
    return fields.whole(name, 0, MOST_TOLD)


def wants_usage(fields: Fields) -> bool:
    """Whether a stream ends with a chunk of the usage."""
    options = fields.object("stream_options")
    return bool(options and options.flag("include_usage"))


def number(logprob: float) -> float:
    """A log probability as JSON has it."""
    return max(logprob, LEAST_LOGPROB)


def told(token: int, logprob: float, top: Sequence[tuple[int, float]], answering: Answering) -> dict[str, Any]:
    """A token with its log probability, and the likeliest in its place."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = list(answering.token_bytes(token))
        return {"token": answering.token_text(token), "logprob": number(logprob), "bytes": raw}

    return one(token, logprob) | {"top_logprobs": [one(*each) for each in top]}


def model(listed: Listed) -> dict[str, Any]:
    """A model in the list of models; created: when it was loaded."""
    made: dict[str, Any] = {
        "id": listed.name,
        "object": "model",
        "created": int(listed.since or 0),
        "owned_by": "local",
    }
    if listed.context_length:
        made["context_length"] = made["max_model_len"] = listed.context_length
    return made


def questions(catalogue: Catalogue) -> Sequence[Question]:
    """GET /v1/models and /v1/models/{id}."""

    async def all_models(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return {"object": "list", "data": [model(each) for each in catalogue.models()]}

    async def one_model(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return model(found(catalogue, path["name"]))

    return [
        Question("GET", "/v1/models", all_models, error),
        Question("GET", "/v1/models/{name:path}", one_model, error),
    ]
