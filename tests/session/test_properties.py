"""Whatever is done with sessions, each answers as one that has computed its prompt from the beginning."""

import shutil
import tempfile

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlx_qwen35.cache import Cache
from mlx_qwen35.generation import prefill
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.processor import Prompt
from mlx_qwen35.session import Sessions, load_session
from mlx_qwen35.speculative import Drafting
from tests.drafted import random_head
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.soak import examples

# With 1e-6, norms of what nearly cancels make float32's rounding many times larger: in float64 too, weights moved by
# 6e-8 of themselves move logits by up to 3e-4 (docs/SESSIONS.md).
MODEL, _ = seeing_model(rms_norm_eps=1e-2)
MODEL.take_mtp(random_head(MTPHead(MODEL.config.text)))
PICTURES = [some_media("image", 4, 6, seed=1), some_media("image", 4, 6, seed=2), some_media("video", 2, 4, 4, seed=3)]
PART = st.one_of(st.integers(1, 9), st.sampled_from(PICTURES))
WHICH = st.integers(0, 7)
DRAFTING = Drafting(MODEL.mtp, 2)


def guesses(cache: Cache) -> np.ndarray:
    """The logits of two guesses after token 7 that takes itself to be followed by 5."""
    found = []

    def choose(logits: mx.array) -> mx.array:
        found.append(logits)
        return mx.array([5])

    cache.draft.guess(mx.array([7]), 2, choose)
    return np.array(mx.concatenate(found))


class Talk(RuleBasedStateMachine):
    """Sessions of one pool, each with the parts of its prompt: a number is so many words, a medium itself.

    Words depend on their place and on `said`, so that prompts of equal parts may still differ.
    """

    drafts = False  # whether the MTP head follows them all

    def __init__(self) -> None:
        super().__init__()
        self.pool = Sessions(MODEL, most_bytes=1 << 30)
        self.sessions = [self.pool.new()]
        self.parts: list[list] = [[3]]
        self.said = [0]

    def at(self, which: int) -> int:
        return which % len(self.sessions)

    def prompt(self, at: int) -> Prompt:
        tokens, media = prompt_of(*self.parts[at], seed=self.said[at])
        return Prompt(tokens, None, False, tuple(media), turns=(0, min(2, len(tokens) - 1), len(tokens) - 1))

    def compute(self, at: int, stop: int | None = None) -> np.ndarray | None:
        """As stream_generate does, in chunks of 5 tokens; cancelled after `stop` chunks."""
        session, prompt, chunks = self.sessions[at], self.prompt(at), 0
        covered = session.go_on(prompt)
        if self.drafts:
            session.cache.draft = DRAFTING.drafter(MODEL, session.cache)

        def on_progress(done: int, total: int) -> None:
            nonlocal chunks
            session.reached(5)
            chunks += 1

        boundaries = [place - covered for place in session.meetings]
        logits = prefill(
            MODEL,
            prompt.tokens,
            session.cache,
            media=prompt.media,
            covered=covered,
            chunk_size=5,
            boundaries=boundaries,
            on_progress=on_progress,
            cancel=lambda: stop is not None and chunks > stop,
        )
        session.settle(prompt.tokens)
        return None if logits is None else np.array(logits)[0]

    @rule(which=WHICH, part=PART)
    def extend(self, which: int, part) -> None:
        at = self.at(which)
        if len(self.parts[at]) < 8:
            self.parts[at] = [*self.parts[at], part]
        self.compute(at)

    @rule(which=WHICH, length=st.integers(1, 7), part=PART)
    def rewind(self, which: int, length: int, part) -> None:
        at = self.at(which)
        self.parts[at] = [*self.parts[at][:length], part]
        self.compute(at)

    @rule(which=WHICH, said=st.integers(0, 2))
    def rewrite(self, which: int, said: int) -> None:
        self.said[self.at(which)] = said

    @rule(which=WHICH)
    def branch(self, which: int) -> None:
        at = self.at(which)
        if len(self.sessions) < 4:
            self.sessions.append(self.sessions[at].branch())
            self.parts.append(list(self.parts[at]))
            self.said.append(self.said[at])

    @rule(which=WHICH, part=PART, stop=st.integers(0, 3))
    def cancel(self, which: int, part, stop: int) -> None:
        at = self.at(which)
        self.parts[at] = [*self.parts[at][:7], part]
        self.compute(at, stop)

    @rule(which=WHICH, most=st.sampled_from([0, 20_000, 60_000]))
    def evict(self, which: int, most: int) -> None:
        at = self.at(which)
        self.pool.most_bytes = most
        self.compute(at)
        held = [session for session in self.sessions if session.tokens]
        assert self.sessions[at] in held and (self.pool.nbytes <= most or len(held) == 1)
        self.pool.most_bytes = 1 << 30

    @rule(which=WHICH)
    def save_and_load(self, which: int) -> None:
        at, folder = self.at(which), tempfile.mkdtemp()
        self.sessions[at].save(f"{folder}/session")
        self.sessions[at] = load_session(f"{folder}/session", MODEL, pool=self.pool)
        shutil.rmtree(folder)

    @rule(which=WHICH)
    def guess_in_vain(self, which: int) -> None:
        cache = self.sessions[self.at(which)].cache
        if cache.draft is not None and cache.offset:
            before = cache.snapshot()
            guesses(cache)
            cache.restore(before)

    @invariant()
    def covers_what_it_says(self) -> None:
        for session in self.sessions:
            assert session.cache.offset == len(session.tokens)
            if self.drafts and session.tokens:
                held, waiting, covered = session.cache.draft.mark()
                assert held + sum(part.tokens.shape[1] for part in waiting) == covered == session.cache.offset

    def teardown(self) -> None:
        """Logits go to 20."""
        for at in range(len(self.sessions)):
            prompt = self.prompt(at)
            whole = MODEL(mx.array([prompt.tokens]), None, list(prompt.media))[0, -1]
            np.testing.assert_allclose(self.compute(at), np.array(whole), atol=1e-3)
            if self.drafts:
                fresh = MODEL.make_cache()
                fresh.draft = DRAFTING.drafter(MODEL, fresh)
                prefill(MODEL, prompt.tokens, fresh, media=prompt.media)
                np.testing.assert_allclose(guesses(self.sessions[at].cache), guesses(fresh), atol=1e-3)


class DraftedTalk(Talk):
    drafts = True


Talk.TestCase.settings = settings(max_examples=examples(40), stateful_step_count=12)
DraftedTalk.TestCase.settings = Talk.TestCase.settings
TestTalk, TestDraftedTalk = Talk.TestCase, DraftedTalk.TestCase


@pytest.fixture
def pool():
    return Sessions(MODEL, most_bytes=1 << 30)


def fed(session, *parts, seed=1):
    tokens, media = prompt_of(*parts, seed=seed)
    prompt = Prompt(tokens, None, False, tuple(media), turns=(0, 2, len(tokens) - 1))
    covered = session.go_on(prompt)
    prefill(MODEL, tokens, session.cache, media=media, covered=covered, on_progress=lambda *_: session.reached(1))
    session.settle(tokens)
    return covered


def test_branches_share_their_trunk(pool):
    session = pool.new()
    fed(session, 2500)
    alone = pool.nbytes
    branches = [session.branch() for _ in range(5)]
    assert pool.nbytes == alone and len(pool) == 6
    for seed, branch in enumerate(branches):
        assert fed(branch, 2500, 3 + seed) == 2500
    step = sum(array.nbytes for array in MODEL.make_cache().arrays()) + 2 * 4 * 256 * 3 * 16  # a first step of keys
    states = 8 * sum(a.nbytes for a in session.cache.arrays()[:6])
    assert pool.nbytes <= alone + 5 * (step + states) < 2 * alone
    assert all(branch.nbytes >= alone for branch in branches)  # counted alone


def test_the_one_used_longest_ago_gives_way(pool):
    sessions = [pool.new() for _ in range(3)]
    for session in sessions:
        fed(session, 100)
    fed(sessions[0], 100, 3)
    pool.most_bytes = pool.nbytes - 1
    fed(sessions[2], 100, 3)
    assert [len(session.tokens) for session in sessions] == [103, 0, 103]
    assert fed(sessions[1], 100) == 0
    del sessions[0], session
    assert len(pool) == 2
