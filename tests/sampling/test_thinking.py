"""A budget of reasoning: what is forced, when, and that everything else is as without one.

The oracle recomputes all for each token and keeps the account of the reasoning in plain Python.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import load
from mlx_qwen35.engine import allowed as asked
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.generation import generate, generate_batch, stream_generate
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.sampling.thinking import WORDS
from mlx_qwen35.session import Session
from tests.drafted import always, near, random_head, with_head
from tests.talkers import END, PROMPT, VOCAB, Endless, Letters, Script, Typist, assert_covers, random_model

NEWLINE, OPENING, ENDING = 92, 93, 94  # in the places of | } ~
SENTENCE = WORDS.strip()


class Tagged(Letters):
    """Letters with a line end and the two tags."""

    def token_bytes(self, token: int) -> bytes:
        return {NEWLINE: b"\n", OPENING: b"<think>", ENDING: b"</think>"}.get(token) or super().token_bytes(token)

    def token_id(self, token: str) -> int | None:
        return {"<think>": OPENING, "</think>": ENDING}.get(token)

    def encode(self, text: str) -> list[int]:
        return [NEWLINE if character == "\n" else ord(character) - 32 for character in text]


class Thinker(Typist):
    tokenizer = Tagged()

    def prompt(self, prompt, **others) -> Prompt:
        return Prompt(list(prompt), None, True)


class EndlessThinker(Thinker):
    eos_token_ids = frozenset()


class Answerer(EndlessThinker):
    """The prompt does not begin the reasoning."""

    def prompt(self, prompt, **others) -> Prompt:
        return Prompt(list(prompt), None, False)


def ids(text: str) -> list[int]:
    for tag, character in (("<think>", "}"), ("</think>", "~")):
        text = text.replace(tag, character)
    return [NEWLINE if character == "\n" else ord(character) - 32 for character in text]


CLOSING = ids(f"{WORDS}</think>\n\n")
SHORT = ids("Stop.\n</think>\n\n")
AT_ONCE = ids("\n</think>\n\n")


class Stubborn(Script):
    """Says one thing while it reasons, for ever, and another once its input has closed the reasoning."""

    def __init__(self, reasoning: str, answer: str) -> None:
        super().__init__(len(PROMPT))
        self.reasoning, self.answer, self.seen = ids(reasoning), [*ids(answer), END], {}

    def hidden(self, tokens, cache, media=(), *, more=False, **how):
        logits = np.zeros((*tokens.shape, VOCAB), dtype=np.float32)
        for row, fed in enumerate(tokens.tolist()):
            for at, token in enumerate(fed):
                place = cache.offset + at
                self.seen[row] = [*self.seen.get(row, [])[:place], token]
                said = self.seen[row][len(PROMPT) :]
                if ENDING in said:
                    done = len(said) - len(said[: said.index(ENDING)]) - 1
                    done -= 2 if said[said.index(ENDING) + 1 :][:2] == [NEWLINE, NEWLINE] else 0
                    logits[row, at, self.answer[min(max(done, 0), len(self.answer) - 1)]] = 30.0
                else:
                    logits[row, at, self.reasoning[len(said) % len(self.reasoning)]] = 30.0
        self.fed += tokens.tolist()
        cache.offset += tokens.shape[1]
        return mx.array(logits)


def whole(parts) -> dict[str, str]:
    return {name: "".join(getattr(part, name) for part in parts) for name in ("text", "reasoning", "content")}


def test_reasoning_is_closed_and_the_answer_follows():
    parts = list(stream_generate(Stubborn("hmm ", "42"), Thinker(), PROMPT, thinking_budget=6))
    said = whole(parts)
    assert said["text"] == f"hmm hm\n\n{SENTENCE}\n</think>\n\n42"
    assert (said["reasoning"], said["content"]) == (f"hmm hm\n\n{SENTENCE}", "42")
    assert parts[-1].finish_reason == "stop" and parts[-1].generation_tokens == len(parts) == 6 + len(CLOSING) + 3
    assert [part.token for part in parts][6 : 6 + len(CLOSING)] == CLOSING
    # what is forced is shown as it comes
    assert [part.reasoning for part in parts][9:12] == ["o", "n", "s"]
    assert all(not part.content for part in parts[: 6 + len(CLOSING)])


def test_a_budget_of_nothing_closes_at_once():
    parts = list(stream_generate(Stubborn("hmm ", "42"), Thinker(), PROMPT, thinking_budget=0))
    assert whole(parts) == {"text": "\n</think>\n\n42", "reasoning": "", "content": "42"}


def test_reasoning_that_ends_in_time_is_left_alone():
    said = f"hm</think>\n\n{'a long answer ' * 3}"
    model = Script(len(PROMPT), [*ids(said), END])
    assert generate(model, Thinker(), PROMPT, thinking_budget=3) == said.strip() + " "
    assert generate(model, Thinker(), PROMPT, thinking_budget=1000) == said.strip() + " "


def test_it_waits_for_a_tag_that_the_model_opens():
    class Quiet(Thinker):
        prompt = Answerer.prompt

    plain = Script(len(PROMPT), [*ids("no reasoning at all"), END])
    assert generate(plain, Quiet(), PROMPT, thinking_budget=2) == "no reasoning at all"
    parts = list(stream_generate(Stubborn("<think>hmmmm", "42"), Quiet(), PROMPT, thinking_budget=3))
    said = whole(parts)
    assert said["reasoning"] == f"hmm\n\n{SENTENCE}" and said["content"] == "42"


def test_reasoning_that_is_opened_again_is_closed_again():
    said = [*ids("hm"), *CLOSING, OPENING, *CLOSING, *ids("42"), END]
    plan = [*ids("hm"), *[0] * len(CLOSING), OPENING, *[0] * len(CLOSING), *ids("42"), END]
    parts = list(stream_generate(Script(len(PROMPT), plan), Thinker(), PROMPT, thinking_budget=2))
    assert [part.token for part in parts] == said


def test_max_tokens_may_end_before_the_budget_and_in_its_words():
    for limit in (3, 5, 9):
        parts = list(stream_generate(Stubborn("hm", "42"), Thinker(), PROMPT, thinking_budget=5, max_tokens=limit))
        assert [part.token for part in parts] == (ids("hmhmh") + CLOSING)[:limit]
        assert parts[-1].finish_reason == "length" and whole(parts)["content"] == ""


def test_a_stop_string_in_the_words_ends_the_answer():
    parts = list(stream_generate(Stubborn("hm", "42"), Thinker(), PROMPT, thinking_budget=2, stop="limited"))
    assert whole(parts)["reasoning"] == "hm\n\nConsidering the" and parts[-1].finish_reason == "stop"


def test_rows_of_a_batch_have_a_budget_each():
    model = Script(len(PROMPT), ids("hmm " * 99), [*ids("no</think>\n\n7"), END], [*ids("abc"), END])
    options = {"thinking_budget": 5, "max_tokens": 5 + len(CLOSING)}
    first, second, third = generate_batch(model, Thinker(), [PROMPT] * 3, **options)
    assert list(first.tokens) == ids("hmm h") + CLOSING and first.finish_reason == "length"
    assert first.reasoning == f"hmm h\n\n{SENTENCE}"
    assert (second.text, second.finish_reason) == ("no</think>\n\n7", "stop")
    assert third.text == "abc"


# Random models beside the oracle.


def oracle(model, prompt, count, budget, *, inside=True, penalty=None):
    """Greedy tokens, everything anew for each; the account of the reasoning in plain Python."""
    closing = SHORT if budget else AT_ONCE
    tokens, spent, queue = list(prompt), 0, []
    for _ in range(count):
        if inside and spent >= budget and not queue:
            queue = list(closing)
        if queue:
            tokens.append(queue.pop(0))
            inside = bool(queue)
            continue
        logits = np.array(model(mx.array([tokens]))[0, -1])
        if penalty:
            seen = sorted(set(tokens))
            logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        token = int(logits.argmax())
        tokens.append(token)
        spent += inside and token != ENDING
        inside = (inside and token != ENDING) or token == OPENING
    return tokens[-count:]


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request):
    return random_model(request.param)


@pytest.fixture
def short(monkeypatch):
    """Fewer words, since letters are tokens here."""
    monkeypatch.setattr(asked, "WORDS", "Stop.\n")


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("processor", [EndlessThinker(), Answerer()])
@pytest.mark.usefixtures("short")
def test_tokens_are_those_of_a_recomputing_loop(model, budget, processor):
    count = budget + len(SHORT) + 6
    cache = model.make_cache()
    parts = list(
        stream_generate(
            model, processor, PROMPT, cache=cache, thinking_budget=budget, max_tokens=count, sampling=Sampling()
        )
    )
    tokens = [part.token for part in parts]
    assert tokens == oracle(model, PROMPT, count, budget, inside=type(processor) is EndlessThinker)
    assert_covers(model, cache, [*PROMPT, *tokens])


@pytest.mark.usefixtures("short")
def test_forced_tokens_count_for_penalties(model):
    count = 4 + len(SHORT) + 20
    options = {"thinking_budget": 4, "max_tokens": count, "sampling": Sampling(repetition_penalty=3.0)}
    tokens = [part.token for part in stream_generate(model, EndlessThinker(), PROMPT, **options)]
    assert tokens == oracle(model, PROMPT, count, 4, penalty=3.0)


@pytest.mark.usefixtures("short")
def test_a_batch_is_its_rows_alone(model):
    prompts = [PROMPT, [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]
    options = {"thinking_budget": 5, "max_tokens": len(SHORT) + 12, "sampling": Sampling()}
    for prompt, answer in zip(
        prompts, generate_batch(model, EndlessThinker(), prompts, chunk_size=4, **options), strict=True
    ):
        alone = [part.token for part in stream_generate(model, EndlessThinker(), prompt, **options)]
        assert list(answer.tokens) == alone == oracle(model, prompt, options["max_tokens"], 5)


@pytest.fixture(scope="module")
def answers(model):
    """The oracle's, by their budget: the point falls at each place of a round."""
    return {budget: oracle(model, PROMPT, budget + len(SHORT) + 5, budget) for budget in range(4, 8)}


@pytest.mark.parametrize("drafts, amount", [(1, 0.02), (3, 0.02), (4, 0.0), (4, 1.0)])
@pytest.mark.usefixtures("short")
def test_drafts_change_nothing(monkeypatch, model, answers, drafts, amount):
    """Whatever the drafter thinks, before, at and after the point; a round that goes over it is cut there."""
    always(monkeypatch, drafts)
    kind = "dense" if model.config.text.moe is None else "moe"
    for budget, answer in answers.items():
        cache = model.make_cache()
        options = {"thinking_budget": budget, "max_tokens": len(answer), "sampling": Sampling(), "cache": cache}
        drafting = {"draft_model": near(kind, amount), "num_draft_tokens": drafts}
        tokens = [part.token for part in stream_generate(model, EndlessThinker(), PROMPT, **options, **drafting)]
        assert tokens == answer
        assert_covers(model, cache, [*PROMPT, *tokens])


@pytest.mark.usefixtures("short")
def test_the_models_own_head_drafts(monkeypatch):
    always(monkeypatch, 3)
    model, head, _ = with_head("dense")
    model.take_mtp(random_head(head))
    count = 6 + len(SHORT) + 5
    options = {"thinking_budget": 6, "max_tokens": count, "sampling": Sampling()}
    tokens = [part.token for part in stream_generate(model, EndlessThinker(), PROMPT, mtp=True, **options)]
    assert tokens == oracle(model, PROMPT, count, 6)


@pytest.mark.parametrize("drafter", [None, 0.02])
@pytest.mark.usefixtures("short")
def test_drawn_tokens_are_closed_too_and_the_same_with_a_seed(model, drafter):
    kind = "dense" if model.config.text.moe is None else "moe"
    options = {"sampling": Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, seed=4), "thinking_budget": 9}
    options |= {"max_tokens": 12 + len(SHORT), "draft_model": drafter and near(kind, drafter)}
    first, second = (
        [part.token for part in stream_generate(model, EndlessThinker(), PROMPT, **options)] for _ in range(2)
    )
    assert first == second
    if ENDING not in first[:9]:
        assert first[9 : 9 + len(SHORT)] == SHORT
    options["thinking_budget"] = None
    without = [part.token for part in stream_generate(model, EndlessThinker(), PROMPT, **options)]
    assert drafter or without[:9] == first[:9]  # the budget takes no random numbers


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.usefixtures("short")
def test_a_session_goes_on_from_what_was_forced(monkeypatch, model, drafting):
    always(monkeypatch, 3)
    kind = "dense" if model.config.text.moe is None else "moe"
    more = {"draft_model": near(kind, 0.02)} if drafting else {}
    session, said = Session(model), list(PROMPT)
    for left in (3, 8, 4 + len(SHORT) + 2):  # in the reasoning, in the words, behind them
        stream = stream_generate(
            model, EndlessThinker(), said, session=session, thinking_budget=4, sampling=Sampling(), **more
        )
        new = [next(stream).token for _ in range(left)]
        stream.close()
        assert new == oracle(model, said, left, 4)
        assert session.tokens == [*said, *new]
        said = [*said, *new, 50]
    assert_covers(model, session.cache, session.tokens)


@pytest.mark.usefixtures("short")
def test_log_probabilities_of_what_is_forced(model):
    parts = list(
        stream_generate(model, EndlessThinker(), PROMPT, thinking_budget=2, max_tokens=6, sampling=Sampling())
    )
    for at, part in enumerate(parts):
        assert (part.logprobs[part.token].item() == 0.0) == (at >= 2)


def test_the_demo_answers_after_it_was_stopped():
    """The real tokenizer: <think> and </think> are one token each; with keys and values in 8 bits, and drafts."""
    for loading, more in (({}, {}), ({"kv_bits": 8, "kv_group_size": 32}, {}), ({"mtp": True}, {"mtp": True})):
        model, processor = load(**loading)
        options = {"sampling": Sampling(), "enable_thinking": True, "max_tokens": 120, **more}
        parts = list(stream_generate(model, processor, "What is 17 + 25?", thinking_budget=4, **options))
        said = whole(parts)
        assert said["reasoning"].endswith(SENTENCE) and len(processor.encode(said["reasoning"])) < 4 + len(SENTENCE)
        assert said["text"].count("</think>") == 1
        answer = processor.tokenizer.token_id("</think>")
        assert [part.token for part in parts].count(answer) == 1
        unlimited = whole(list(stream_generate(model, processor, "What is 17 + 25?", thinking_budget=1000, **options)))
        assert SENTENCE not in unlimited["text"] and "42" in unlimited["content"]


@pytest.mark.parametrize("wrong", [-1, 2.5, "5", True, [3], float("nan")])
def test_a_budget_is_a_whole_number(wrong):
    for call, prompt in ((stream_generate, PROMPT), (generate, PROMPT), (generate_batch, [PROMPT])):
        with pytest.raises(ArgumentError, match="thinking_budget is "):
            call(Script(7, []), Thinker(), prompt, thinking_budget=wrong)


def test_a_checkpoint_without_the_tags_says_so():
    class Untagged(Letters):
        def token_id(self, token):
            return None

    class Plain(Endless):
        tokenizer = Untagged()

    with pytest.raises(ArgumentError, match="no tokens <think> and </think>"):
        stream_generate(Script(7, []), Plain(), PROMPT, thinking_budget=3)
