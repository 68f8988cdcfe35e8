"""Keys and values in few bits, and contexts beyond the native one: what is asked for at loading, in a whole answer."""

import json

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.chat_script import picture
from mlx_qwen35 import Sampling, estimate, load
from mlx_qwen35.cli.main import main
from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.library import demo_folder
from mlx_qwen35.library.footprint import cache_bytes
from mlx_qwen35.model import Model
from mlx_qwen35.session import Session

GREEDY = {"sampling": Sampling(), "max_tokens": 8}
ASKED = [{"role": "user", "content": [{"type": "image", "image": picture(3)}, {"type": "text", "text": "What is it?"}]}]


def logits_of(model: Model, prompt, cuts=(10_000,)) -> np.ndarray:
    cache, tokens = model.make_cache(), mx.array([prompt.tokens])
    sight, start, pieces = model.see(tokens, prompt.media), 0, []
    while start < len(prompt.tokens):
        stop = min(start + cuts[len(pieces) % len(cuts)], len(prompt.tokens))
        pieces.append(np.array(model(tokens[:, start:stop], cache, sight[start:stop]))[0])
        start = stop
    return np.concatenate(pieces)


@pytest.fixture(scope="module")
def plain():
    return load()


def test_packed_keys_change_little_and_less_with_more_bits(plain):
    model, processor = plain
    prompt = processor.prompt(ASKED, system="You are a helpful assistant. " * 8)
    exact, distances = logits_of(model, prompt), []
    for bits, start in ((4, 0), (8, 0), (8, 64), (8, 10_000)):
        packed, _ = load(kv_bits=bits, kv_group_size=32, quantized_kv_start=start)
        found = logits_of(packed, prompt)
        np.testing.assert_allclose(logits_of(packed, prompt, (7, 1, 30)), found, atol=2e-3)  # whatever the pieces
        distances.append(np.abs(found - exact).mean())
    assert exact.std() > 3 > 0.5 > distances[0] > 4 * distances[1] > 0
    assert distances[2] < distances[1] and distances[3] < 1e-5


def test_packed_keys_in_sessions_batches_and_the_plan(plain):
    model, processor = load(kv_bits=8, kv_group_size=32)
    session, said = Session(model), []
    for kept in (session, None):
        parts = list(stream_generate(model, processor, ASKED, session=kept, **GREEDY))
        parts = list(stream_generate(model, processor, ASKED, session=kept, **GREEDY))
        said.append([part.token for part in parts])
    assert said[0] == said[1] and session.cache.offset == len(session.tokens)
    alone = [list(stream_generate(model, processor, text, **GREEDY)) for text in ("Hello!", "What is 2 + 3?")]
    rows = generate_batch(model, processor, ["Hello!", "What is 2 + 3?"], **GREEDY)
    assert [list(row.tokens) for row in rows] == [[part.token for part in parts] for parts in alone]
    cache = model.make_cache()
    mx.eval(model(mx.array([[5] * 300]), cache))
    options = {"context_length": 300, "dtype": "float32"}
    plan = estimate(None, kv_bits=8, kv_group_size=32, **options)
    assert plan.cache == cache.nbytes < 0.4 * estimate(None, **options).cache + plan.cache_constant
    assert cache_bytes(model.config, 4, model.kv_form)[0] == plan.cache_per_token


def test_what_makes_no_sense_is_refused_before_loading():
    uneven = {"kv_bits": 8, "kv_group_size": 128}
    for wrong, words in (({"kv_bits": 5}, "kv_bits is 5"), (uneven, "divide.*head_dim 64")):
        with pytest.raises(ValueError, match=words):
            load(**wrong)
        with pytest.raises(ValueError, match=words):
            estimate(None, **wrong)
    assert main(["generate", "-p", "Hello!", "--kv-bits", "5"]) == 2


def test_more_context_with_yarn(plain, capsys):
    with pytest.raises(CheckpointError, match="yarn=True"):
        load(context_length=5000)
    model, processor = load(context_length=5000, yarn=True)
    assert processor.context_length == 5000 and model.config.text.rope.yarn.factor == 2
    tokens = plain[1].prompt("What is 2 + 3?").tokens
    one, other = (np.array(m(mx.array([tokens]))) for m in (model, plain[0]))
    assert np.abs(one - other).max() > 1e-3  # short prompts are changed, as it says
    with pytest.raises(PromptError, match="4996 tokens, the context 4096"):
        plain[1].prompt([5] * 4996)
    assert len(processor.prompt([5] * 4996).tokens) == 4996
    assert estimate(None, context_length=5000, yarn=True).context_length == 5000
    capsys.readouterr()
    flags = ["--context-length", "5000", "--yarn", "--kv-bits", "8", "-n", "2", "--json"]
    assert main(["generate", "-p", "Hello!", *flags]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["finish_reason"] == "length" and "short prompts" in err
    assert main(["generate", "-p", "Hello!", *flags[:2]]) == 2
    assert f"{demo_folder()}" in capsys.readouterr().err
    assert main(["estimate", *flags[:5], "--kv-group-size", "32"]) == 0
