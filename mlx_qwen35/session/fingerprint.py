"""Whose cache it is: what of a model, its files and its settings decides about the numbers in it.

Knows which of it that is, each under a name that an error can say. Knows nothing of sessions.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.model.mtp import MTPHead
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.text.tokenizer import Tokenizer

_vocabularies: WeakKeyDictionary[Tokenizer, str] = WeakKeyDictionary()
_SAMPLE = 64  # values of each tensor


def fingerprint(model: Model, processor: Processor | None) -> dict[str, str]:
    """Name -> hash. Equal for two loads of one checkpoint in one precision, and different in what the two differ in.

    Weights are told apart by the names, shapes and dtypes of all tensors and by 64 values of each, spread over it: a
    fine-tune or an adapter changes those, and all of a large model would take minutes to read. Experts that are
    streamed are not looked at. processor None: nothing is said of tokenizer and template.
    """
    raw = dict(model.config.raw)
    quantization = {key: raw.pop(key) for key in ("quantization", "quantization_config") if key in raw}
    found = {
        "config.json": hash_of(raw),
        "quantization": hash_of([quantization, _dtypes(model)]),
        "weights": _weights(model),
        "positions": hash_of(repr(model.config.text.rope)),
    }
    found |= model.ranks_told or {}
    if processor is not None:
        if processor.tokenizer not in _vocabularies:  # half a second for 250,000 entries
            vocabulary = sorted(processor.tokenizer.vocabulary().items(), key=lambda item: item[1])
            _vocabularies[processor.tokenizer] = hash_of(vocabulary)
        found["tokenizer"] = _vocabularies[processor.tokenizer]
        found["chat template"] = hash_of(processor.template.source)
    return found


def fingerprint_of_head(head: MTPHead) -> str:
    """The same of the model's MTP head, which decides about no token: who loads a session may have another, or none."""
    return hash_of([_dtypes(head), _weights(head)])


def _dtypes(model: Model | MTPHead) -> list[Any]:
    return [(name, list(array.shape), str(array.dtype)) for name, array in _parameters(model)]


def _weights(model: Model | MTPHead) -> str:
    samples = []
    for _, array in _parameters(model):
        flat = array.reshape(-1)
        samples.append(flat[:: max(1, array.size // _SAMPLE)][:_SAMPLE].astype(mx.float32))
    return hashlib.blake2b(np.array(mx.concatenate(samples)), digest_size=16).hexdigest()


def _parameters(model: Model | MTPHead) -> list[tuple[str, mx.array]]:
    return sorted(tree_flatten(model.parameters()))


def hash_of(value: Any) -> str:
    """Of anything that JSON can say."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
