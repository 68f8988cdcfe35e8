"""Generation: the tokens are those of a loop that recomputes everything, and the cache is exact wherever it ends."""

import re
import threading
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35.cache import Cache
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import PromptError
from mlx_qwen35.generation import generate, generate_batch, prefill, statistics, stream_generate
from mlx_qwen35.model import Model
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from tests.checkpoints import tiny_config

VOCAB = 96
END = 95
EURO = (1, 2)  # two tokens that are one character
PROMPT = [11, 45, 60, 3, 3, 71, 8]


class Letters:
    """Tokens that stand for the characters from the space on, but for two halves of a euro sign."""

    def token_bytes(self, token: int) -> bytes:
        return {1: b"\xe2\x82", 2: b"\xac"}.get(token, bytes([token + 32]))

    def is_special(self, token: int) -> bool:
        return False


class Typist:
    """A processor without a checkpoint: a text is its letters."""

    tokenizer = Letters()
    eos_token_ids = frozenset({END})
    generation_config = {}
    context_length = 4096

    def prompt(self, prompt, *, tools=None, enable_thinking=None, system=None) -> Prompt:
        tokens = spell(prompt) if isinstance(prompt, str) else list(prompt)
        return Prompt(tokens, None, bool(enable_thinking))


class Endless(Typist):
    eos_token_ids = frozenset()


def spell(text: str) -> list[int]:
    tokens = []
    for character in text:
        tokens += EURO if character == "€" else [ord(character) - 32]
    return tokens


class Script:
    """A model that says what it was told to, by the position of its input; `head` is the identity."""

    config = SimpleNamespace(text=SimpleNamespace(vocab_size=VOCAB))

    def __init__(self, prompt_length: int, *answers: list[int]) -> None:
        self.prompt_length, self.answers = prompt_length, answers
        self.fed: list[list[int]] = []

    def make_cache(self, batch=1, left_padding=None) -> Cache:
        return Cache([], left_padding=left_padding)

    def hidden(self, tokens, cache):
        rows, length = tokens.shape
        logits = np.zeros((rows, length, VOCAB), dtype=np.float32)
        for row, answer in enumerate(self.answers):
            for at in range(length):
                said = cache.offset + at + 1 - self.prompt_length
                logits[row, at, answer[said] if 0 <= said < len(answer) else 0] = 30.0
        self.fed += tokens.tolist()
        cache.offset += length
        return mx.array(logits)

    def head(self, hidden):
        assert hidden.shape[1] == 1, "only the last position needs logits"
        return hidden


def say(text: str, *, end: bool = True) -> Script:
    return Script(len(PROMPT), spell(text) + [END] * end)


def random_model(kind: str) -> Model:
    """Weights so large that one token too many in any state shows in the logits."""
    model = Model(ModelConfig.from_dict(tiny_config(kind)))
    rng = np.random.default_rng(5)

    def values(name: str, old: mx.array) -> mx.array:
        noise = rng.standard_normal(old.shape)
        if name.endswith("A_log"):
            noise = np.log(rng.uniform(0.05, 2, old.shape))
        elif name.endswith("norm.weight"):
            noise = 1 + 0.3 * noise
        elif name.endswith("weight") and "embed" not in name:
            noise *= 1.5 / np.sqrt(old.shape[1] if "conv1d" in name else old.shape[-1])
        return mx.array(noise.astype(np.float32))

    model.load_weights([(name, values(name, old)) for name, old in tree_flatten(model.parameters())])
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request) -> Model:
    return random_model(request.param)


@pytest.fixture(scope="module")
def dense() -> Model:
    return random_model("dense")


def recomputed(model: Model, tokens: list[int], count: int) -> list[int]:
    """Greedy, everything anew for each token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(model(mx.array([tokens]))[0, -1].argmax().item())
    return tokens[-count:]


def assert_covers(model: Model, cache: Cache, tokens: list[int]) -> None:
    """The cache holds exactly `tokens`: going on from it is what computing all of it gives, twice in a row."""
    assert cache.offset == len(tokens)
    more = [5, 17, 33]
    whole = np.array(model(mx.array([[*tokens, *more]])))[0, -len(more) :]
    np.testing.assert_allclose(np.array(model(mx.array([more[:2]]), cache))[0], whole[:2], atol=2e-4)
    np.testing.assert_allclose(np.array(model(mx.array([more[2:]]), cache))[0], whole[2:], atol=2e-4)


def greedy(model, prompt=PROMPT, **options):
    options = {"sampling": Sampling(), "max_tokens": 12} | options
    return stream_generate(model, Endless(), prompt, **options)


def test_greedy_tokens_are_those_of_a_recomputing_loop(model):
    parts = list(greedy(model, chunk_size=3))
    assert [part.token for part in parts] == recomputed(model, PROMPT, 12)
    assert [part.generation_tokens for part in parts] == list(range(1, 13))
    assert [part.finish_reason for part in parts] == [None] * 11 + ["length"]
    assert {part.prompt_tokens for part in parts} == {len(PROMPT)}
    assert {part.cached_tokens for part in parts} == {0}
    last = parts[-1]
    assert last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 0
    logits = np.array(model(mx.array([[*PROMPT, *(part.token for part in parts[:4])]]), None)[0, -1])
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(np.array(parts[4].logprobs), expected, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
def test_chunked_prefill_is_the_whole(model, chunk_size):
    progress = []
    cache = model.make_cache()
    logits = prefill(model, PROMPT, cache, chunk_size=chunk_size, on_progress=lambda *at: progress.append(at))
    np.testing.assert_allclose(np.array(logits), np.array(model(mx.array([PROMPT]))[:, -1]), atol=1e-4)
    done = [*range(0, len(PROMPT), chunk_size), len(PROMPT)]
    assert progress == [(at, len(PROMPT)) for at in done]
    assert_covers(model, cache, PROMPT)


def test_prefill_computes_the_head_for_the_last_row_only(dense, monkeypatch):
    shapes = []
    head = Model.head
    monkeypatch.setattr(Model, "head", lambda self, hidden: shapes.append(hidden.shape) or head(self, hidden))
    prefill(dense, PROMPT, dense.make_cache(), chunk_size=3)
    assert [shape[:2] for shape in shapes] == [(1, 1)]


def test_prefill_stops_at_boundaries_where_a_snapshot_can_be_taken(dense):
    cache, kept = dense.make_cache(), []

    def on_progress(done, total):
        if done == 5:
            kept.append(cache.snapshot())

    prefill(dense, PROMPT, cache, chunk_size=4, boundaries=[0, 5, 99], on_progress=on_progress)
    cache.restore(kept[0])
    assert_covers(dense, cache, PROMPT[:5])


# Where an answer can end. Each leaves the generator after `n` parts in its own way.


def by_length(model, cache):
    return list(greedy(model, cache=cache, max_tokens=4))


def by_one_token(model, cache):
    return list(greedy(model, cache=cache, max_tokens=1))


def by_end_of_turn(model, cache):
    processor = Typist()
    processor.eos_token_ids = frozenset({recomputed(model, PROMPT, 3)[-1]})
    parts = list(stream_generate(model, processor, PROMPT, sampling=Sampling(), cache=cache))
    assert parts[-1].finish_reason == "stop"
    return parts


def by_stop_string(model, cache):
    processor = Typist()
    spelled = iter("abcdefghij")
    processor.tokenizer = SimpleNamespace(token_bytes=lambda token: next(spelled).encode())
    parts = list(stream_generate(model, processor, PROMPT, sampling=Sampling(), cache=cache, stop="cd"))
    assert "".join(part.text for part in parts) == "ab"
    assert parts[-1].finish_reason == "stop" and parts[-1].token is not None
    return parts


def by_event(model, cache):
    cancel, parts = threading.Event(), []
    for part in greedy(model, cache=cache, cancel=cancel):
        parts.append(part)
        if len(parts) == 3:
            cancel.set()
    assert parts[-1].finish_reason == "cancelled" and parts[-1].token is None
    assert parts[-1].generation_tokens == 3
    return parts


def by_callable(model, cache):
    parts = []
    for part in greedy(model, cache=cache, cancel=lambda: len(parts) >= 2):
        parts.append(part)
    assert parts[-1].finish_reason == "cancelled"
    return parts


def by_close(model, cache):
    stream = greedy(model, cache=cache)
    parts = [next(stream) for _ in range(3)]
    stream.close()
    return parts


def by_close_at_once(model, cache):
    stream = greedy(model, cache=cache)
    parts = [next(stream)]
    del stream
    return parts


def interrupted(model, cache, **options):
    parts = []
    with pytest.raises(KeyboardInterrupt):
        for part in greedy(model, cache=cache, **options):
            parts.append(part)
    assert 0 < len(parts) < 12
    return parts


def by_interrupt_in_the_forward_pass(model, cache):
    calls, layer = [], type(model.layers[0])
    forward = layer.__call__

    def failing(self, *arguments):
        calls.append(self)
        if len(calls) == 5 * len(model.layers) + 3:  # two layers of the sixth pass have taken their token
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "__call__", failing)
        return interrupted(model, cache)


def by_interrupt_between_token_and_part(model, cache):
    # the cache has the token already, the caller never gets it
    tokens = []

    def token_bytes(self, token):
        tokens.append(token)
        if len(tokens) == 4:
            raise KeyboardInterrupt
        return b"x"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Letters, "token_bytes", token_bytes)
        return interrupted(model, cache)


def by_interrupt_while_sampling(model, cache):
    from mlx_qwen35.sampling import Sampler

    calls, draw = [], Sampler.__call__

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", failing)
        return interrupted(model, cache)


ENDS = [
    by_length,
    by_one_token,
    by_end_of_turn,
    by_stop_string,
    by_event,
    by_callable,
    by_close,
    by_close_at_once,
    by_interrupt_in_the_forward_pass,
    by_interrupt_between_token_and_part,
    by_interrupt_while_sampling,
]


@pytest.mark.parametrize("ends", ENDS)
def test_the_cache_covers_the_prompt_and_what_was_handed_out(dense, ends):
    cache = dense.make_cache()
    tokens = [part.token for part in ends(dense, cache) if part.token is not None]
    assert tokens == recomputed(dense, PROMPT, len(tokens))
    assert_covers(dense, cache, PROMPT + tokens)


def test_an_interrupt_while_the_moe_model_runs(model):
    cache = model.make_cache()
    tokens = [part.token for part in by_interrupt_in_the_forward_pass(model, cache)]
    assert_covers(model, cache, PROMPT + tokens)


def test_a_cancelled_prefill_keeps_whole_chunks(dense):
    cache, progress = dense.make_cache(), []
    parts = list(
        greedy(
            dense,
            cache=cache,
            chunk_size=2,
            on_progress=lambda *at: progress.append(at),
            cancel=lambda: progress[-1:] == [(4, len(PROMPT))],
        )
    )
    assert [(part.token, part.finish_reason, part.prompt_tokens) for part in parts] == [(None, "cancelled", 4)]
    assert_covers(dense, cache, PROMPT[:4])


def test_an_interrupted_prefill_keeps_whole_chunks(dense, monkeypatch):
    cache, calls, layer = dense.make_cache(), [], type(dense.layers[0])
    forward = layer.__call__

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == len(dense.layers) + 2:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer, "__call__", failing)
        list(greedy(dense, cache=cache, chunk_size=4))
    assert_covers(dense, cache, PROMPT[:4])


def test_cancelled_before_it_began(dense):
    cache = dense.make_cache()
    parts = list(greedy(dense, cache=cache, cancel=lambda: True))
    assert [(part.token, part.text, part.finish_reason) for part in parts] == [(None, "", "cancelled")]
    assert cache.offset == 0


def test_a_cache_is_continued(model):
    cache = model.make_cache()
    first = [part.token for part in greedy(model, cache=cache, max_tokens=3)]
    parts = list(greedy(model, [20, 21], cache=cache, max_tokens=3))
    assert [part.token for part in parts] == recomputed(model, [*PROMPT, *first, 20, 21], 3)
    assert (parts[0].prompt_tokens, parts[0].cached_tokens) == (2, len(PROMPT) + 3)


def test_one_token_is_fed_once(dense):
    script = say("hello")
    list(stream_generate(script, Typist(), PROMPT, chunk_size=5))
    assert script.fed == [PROMPT[:5], PROMPT[5:], *([token] for token in spell("hello")), [END]]


def test_max_tokens_nothing_and_no_limit(dense):
    cache = dense.make_cache()
    parts = list(greedy(dense, cache=cache, max_tokens=0))
    assert [(part.token, part.finish_reason) for part in parts] == [(None, "length")]
    assert cache.offset == len(PROMPT)
    parts = list(greedy(dense, max_tokens=None, context_length=len(PROMPT) + 9))
    assert len(parts) == 9 and parts[-1].finish_reason == "length"


def test_text_reasons_and_the_end_of_turn():
    parts = list(stream_generate(say("It is 5€."), Typist(), PROMPT))
    assert [part.text for part in parts] == ["I", "t", " ", "i", "s", " ", "5", "", "€", ".", ""]
    assert parts[-1].token == END and parts[-1].finish_reason == "stop"
    # cut off inside a character
    parts = list(stream_generate(say("5€"), Typist(), PROMPT, max_tokens=2))
    assert [part.text for part in parts] == ["5", "\ufffd"]
    assert parts[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "said, stop, shown, reason",
    [
        ("one two three", "two", "one ", "stop"),
        ("one two three", ["zzz", "o th"], "one tw", "stop"),
        ("one two", "two!", "one two", "stop"),  # a beginning of a stop string comes out at the end
        ("5€ and 6€", "€ and 6€", "5", "stop"),
        ("aaab", "aab", "a", "stop"),
        ("two", "two", "", "stop"),
    ],
)
def test_stop_strings_never_leak(said, stop, shown, reason):
    parts = list(stream_generate(say(said), Typist(), PROMPT, stop=stop))
    assert "".join(part.text for part in parts) == shown
    assert "".join(part.content for part in parts) == shown.strip()
    assert parts[-1].finish_reason == reason
    assert len([part for part in parts if part.finish_reason]) == 1


def test_what_was_held_back_comes_out_at_the_length_and_when_cancelled():
    parts = list(stream_generate(say("abcdef"), Typist(), PROMPT, stop="defx", max_tokens=5))
    assert [part.text for part in parts] == ["a", "b", "c", "", "de"]
    parts = []
    for part in stream_generate(say("abcdef"), Typist(), PROMPT, stop="defx", cancel=lambda: len(parts) == 5):
        parts.append(part)
    assert [part.text for part in parts] == ["a", "b", "c", "", "", "de"]
    assert parts[-1].finish_reason == "cancelled"


def test_reasoning_content_and_tool_calls_are_told_apart():
    call = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
    said = f"I should add.</think>Adding: {call}".replace("\n", " ")
    tools = [
        {
            "type": "function",
            "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        }
    ]
    parts = list(stream_generate(say(said), Typist(), PROMPT, tools=tools, enable_thinking=True))
    assert "".join(part.text for part in parts) == said
    assert "".join(part.reasoning for part in parts) == "I should add."
    assert "".join(part.content for part in parts) == "Adding:"
    (found,) = [found for part in parts for found in part.tool_calls]
    assert found.name == "add"
    assert generate(say(said), Typist(), PROMPT, enable_thinking=True) == said
    assert generate(say(said), Typist(), PROMPT, enable_thinking=True, content_only=True) == "Adding:"


def test_errors_come_before_anything_is_computed():
    class Untouched(Script):
        def hidden(self, tokens, cache):
            raise AssertionError("computed")

    model = Untouched(0, [])
    with pytest.raises(PromptError, match="empty"):
        stream_generate(model, Typist(), [])
    with pytest.raises(PromptError, match="7 tokens.*holds 7"):
        stream_generate(model, Typist(), PROMPT, context_length=7)
    cache = model.make_cache()
    cache.offset = 5
    with pytest.raises(PromptError, match="7 tokens after 5 in the cache.*holds 12"):
        stream_generate(model, Typist(), PROMPT, context_length=12, cache=cache)
    processor = Typist()
    processor.context_length = 6
    with pytest.raises(PromptError, match="holds 6"):
        generate_batch(model, processor, [[1], PROMPT])
    with pytest.raises(PromptError, match="stop string"):
        stream_generate(model, Typist(), PROMPT, stop=[""])


def test_sampling_comes_from_the_generation_config_unless_given(dense):
    processor = Endless()
    processor.generation_config = {"do_sample": True, "temperature": 5.0}
    tokens = [part.token for part in stream_generate(dense, processor, PROMPT, max_tokens=12)]
    assert tokens != recomputed(dense, PROMPT, 12)
    sampling = Sampling(temperature=1.0, seed=3)
    runs = [[part.token for part in greedy(dense, sampling=sampling)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_repetition_penalty_knows_prompt_answer_and_cached_tokens(dense):
    def loop(tokens, count):
        tokens = list(tokens)
        for _ in range(count):
            logits = np.array(dense(mx.array([tokens]))[0, -1])
            seen = sorted(set(tokens))
            logits[seen] = np.where(logits[seen] < 0, logits[seen] * 3, logits[seen] / 3)
            tokens.append(int(logits.argmax()))
        return tokens[-count:]

    sampling = Sampling(repetition_penalty=3.0)
    cache = dense.make_cache()
    first = [part.token for part in greedy(dense, sampling=sampling, cache=cache, max_tokens=8)]
    assert first == loop(PROMPT, 8)
    known = [*PROMPT, *first]
    start = cache.snapshot()
    more = [part.token for part in greedy(dense, [20], sampling=sampling, cache=cache, cached_ids=known, max_tokens=20)]
    assert more == loop([*known, 20], 20)
    cache.restore(start)
    unaware = [part.token for part in greedy(dense, [20], sampling=sampling, cache=cache, max_tokens=20)]
    assert unaware != more


def test_a_batch_is_its_rows_alone(model):
    prompts = [PROMPT, [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [50, 51]]
    answers = generate_batch(model, Endless(), prompts, max_tokens=6, sampling=Sampling(), chunk_size=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = list(greedy(model, prompt, max_tokens=6))
        assert list(answer.tokens) == [part.token for part in alone]
        assert answer.text == "".join(part.text for part in alone)
        assert (answer.prompt_tokens, answer.finish_reason) == (len(prompt), alone[-1].finish_reason)


def test_the_rows_of_a_batch_end_on_their_own():
    model = Script(3, [*spell("ab"), END], spell("abcdefghij"), spell("xSTOPy"))
    answers = generate_batch(model, Typist(), [[1, 2, 3], [4, 5, 6], [7, 8, 9]], max_tokens=8, stop="STOP")
    assert [(answer.text, answer.finish_reason) for answer in answers] == [
        ("ab", "stop"),
        ("abcdefgh", "length"),
        ("x", "stop"),
    ]
    assert answers[0].tokens == (*spell("ab"), END)
    assert generate_batch(model, Typist(), []) == []


def test_a_cancelled_batch_gives_what_there_is():
    model = Script(3, spell("abcdef"), [*spell("x"), END])
    fed = model.fed
    answers = generate_batch(
        model, Typist(), [[1, 2, 3], [4, 5, 6]], max_tokens=9, stop="cz", cancel=lambda: len(fed) >= 8
    )
    assert [(answer.text, answer.finish_reason) for answer in answers] == [("abc", "cancelled"), ("x", "stop")]


def test_statistics_read_as_mlx_lm_prints_them(capsys):
    text = generate(say("hello"), Typist(), PROMPT, verbose=True)
    printed = capsys.readouterr().out
    assert text == "hello" and printed.startswith("hello\n==========\n")
    number = r"\d+\.\d{3}"
    assert re.fullmatch(
        rf"Prompt: 7 tokens, {number} tokens-per-sec\n"
        rf"Generation: 6 tokens, {number} tokens-per-sec\n"
        rf"Peak memory: {number} GB\n",
        printed.partition("==========\n")[2],
    )
    cache = Cache([])
    cache.offset = 4
    *_, last = stream_generate(Script(len(PROMPT) + 4, [END]), Typist(), PROMPT, cache=cache)
    assert "(4 more from the cache)" in statistics(last)
