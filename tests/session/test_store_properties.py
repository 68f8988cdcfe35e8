"""Whatever rows do with a store, each answers as one that has computed its prompt from the beginning, none waits for
ever, and no byte is held that is not counted."""

import shutil
import tempfile
import warnings
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.errors import Qwen35Warning
from mlx_qwen35.model import Model
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.processor import Prompt
from mlx_qwen35.session import Session, beginnings, paths, store
from mlx_qwen35.speculative import Drafting
from tests.drafted import random_head
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.session.rows import Row
from tests.soak import examples
from tests.tiny_model import tiny_model

PICTURES = [some_media("image", 4, 6, seed=1), some_media("image", 4, 6, seed=2), some_media("video", 2, 4, 4, seed=3)]
WHICH, PARTS = st.integers(0, 7), st.sampled_from([13, 13, 40, 40, *PICTURES])
ARRIVAL = {
    "trunk": st.sampled_from([[30], [30], [30, 25], [9]]),
    "rest": st.lists(PARTS, max_size=2),
    "said": st.sampled_from([0, 0, 0, 0, 1]),
    "drafted": st.booleans(),
    "own": st.sampled_from([None, None, None, 0, 1]),
}


def seeing() -> tuple[Model, list]:
    model, _ = seeing_model(rms_norm_eps=1e-2)
    model.take_mtp(random_head(MTPHead(model.config.text)))
    return model, [None, Drafting(model.mtp, 2)]


def packed() -> tuple[Model, list]:
    rope = {"mrope_section": [4, 2, 2]}
    model, _ = tiny_model(head_dim=32, rms_norm_eps=1e-2, rope_parameters=rope)
    model.kv_form = KVFormat(8, 32, 7)
    return model, [None]


class Course(RuleBasedStateMachine):
    """Rows of one store; some wait, some compute. Words of a prompt depend on their place and on `said`."""

    made, pictures, share_from, atol = staticmethod(seeing), True, 8192, 1e-3

    def __init__(self) -> None:
        super().__init__()
        kind = type(self)
        if not hasattr(kind, "model"):
            kind.model, kind.draftings = kind.made()
        self.patches = [
            patch.multiple(store, WORTH=6, _READ=4),
            patch.multiple(beginnings, WORTH=6, SHARE_FROM=self.share_from),
            patch.object(paths, "SHARE_FROM", self.share_from),
        ]
        for each in self.patches:
            each.start()
        self.folder = tempfile.mkdtemp()
        self.warned = warnings.catch_warnings()
        self.warned.__enter__()
        warnings.simplefilter("error", Qwen35Warning)
        self.waiting, self.running, self.own = [], [], [Session(self.model) for _ in range(2)]
        self.opened(1 << 30)

    def opened(self, most_bytes: int) -> None:
        self.store = store.Store(self.model, most_bytes=most_bytes, directory=self.folder)

    @rule(**ARRIVAL)
    def arrive(self, **arrival) -> None:
        self.begun(**arrival)

    def begun(self, trunk, rest, said, drafted, own) -> Row:
        tokens, media = [], []
        for part in [*trunk, *rest]:  # what two prompts have in common is what their parts have
            part = part if self.pictures or isinstance(part, int) else 5
            own_tokens, shown = prompt_of(part, seed=part + 100 * said if isinstance(part, int) else 0)
            tokens, media = tokens + own_tokens, media + shown
        turns = sorted({0, min(30, len(tokens) - 1), len(tokens) - 1})
        prompt = Prompt(tokens, None, False, tuple(media), turns=tuple(turns))
        drafting = self.draftings[-1] if drafted else None
        session = None if own is None else self.own[own]
        if any(row.own is session for row in [*self.waiting, *self.running]):
            session = None
        row = Row(self.store, prompt, chunk=7, drafting=drafting, own=session)
        self.waiting.append(row)
        self.ask()
        return row

    @rule(**ARRIVAL)
    def come_and_go(self, **arrival) -> None:
        row = self.begun(**arrival)
        while row in self.waiting or row in self.running:
            self.turn()

    @rule(**ARRIVAL)
    def come_and_go_too(self, **arrival) -> None:
        """For courses in which more of that happens."""
        self.come_and_go(**arrival)

    def turn(self) -> None:
        """A step of everybody who computes a prompt; whose is done, ends."""
        self.ask()
        for row in list(self.running):
            if row.step():
                if not row.said:
                    self.check(row)
                row.end()
                self.running.remove(row)

    def ask(self) -> None:
        for row in list(self.waiting):
            if row.begin():
                held = row.session.tokens
                assert held == row.prompt.tokens[: len(held)] and row.session.cache.offset == len(held)
                self.waiting.remove(row)
                self.running.append(row)

    @rule(which=WHICH, count=st.integers(1, 12))
    def step(self, which: int, count: int) -> None:
        self.ask()
        if self.running:
            row = self.running[which % len(self.running)]
            for _ in range(count):
                if row.step() and not row.said:
                    self.check(row)
            self.ask()

    def check(self, row: Row) -> None:
        if row.session.cache.offset == len(row.prompt.tokens):
            cache = self.model.make_cache()
            whole = self.model(mx.array([row.prompt.tokens]), cache, list(row.prompt.media))[0, -1]
            np.testing.assert_allclose(np.array(row.logits), np.array(whole), atol=self.atol)
            if row.drafting is not None and row.drafting.draft_model is self.model.mtp:
                held, waiting, covered = row.session.cache.draft.mark()
                assert held + sum(part.tokens.shape[1] for part in waiting) <= covered == row.session.cache.offset

    @rule(which=WHICH, how=st.sampled_from(["end", "end", "end", "fail", "lose"]))
    def leave(self, which: int, how: str) -> None:
        if self.running:
            row = self.running.pop(which % len(self.running))
            if how == "lose" and row.own is None:
                row.session = row._using = None
            elif how == "fail":
                row.fail()
            else:
                row.end()

    @rule(
        amount=st.sampled_from([0, 1, 30_000, 1 << 40]),
        most_bytes=st.sampled_from([0, 100_000, 400_000, 1 << 30, 1 << 30]),
        how=st.sampled_from(["give up", "give up", "clear", "reopen"]),
    )
    def press(self, amount: int, most_bytes: int, how: str) -> None:
        self.store.most_bytes = most_bytes
        if how == "clear":
            self.store.clear()
        elif how == "give up":
            before = self.store.nbytes
            freed = self.store.give_up(amount)
            assert freed == before - self.store.nbytes
            writing = sum(job.nbytes for job in self.store._shelf.jobs)  # first: one may end at any time
            left = self.store.nbytes - self.store.pinned_bytes - writing
            assert freed >= amount or left <= 0
        else:
            for row in self.running:
                row.end()
            self.running = []
            self.store.close()
            self.opened(most_bytes)
            for row in self.waiting:
                row.store = self.store

    @invariant()
    def tree_and_sessions_agree(self) -> None:
        lent = [row.session for row in self.running]
        for path in list(self.store._tree):
            session, key = path.session, self.store._tree.key(path)
            if path.asked is None:
                assert session.cache.offset == len(session.tokens) == len(key) and not session.meetings
            elif session is not None:
                assert any(session is each for each in lent)
            if session is not None:
                assert all(mark.offset <= session.cache.offset for mark in session.marks)
        assert {id(path.session) for path in self.store._lent.values() if path.session} == {id(each) for each in lent}

    def teardown(self) -> None:
        """Those who are left come to an end, in fewer turns than all their tokens."""
        try:
            turns = sum(len(row.prompt.tokens) for row in [*self.waiting, *self.running]) + 10
            while self.waiting or self.running:
                self.turn()
                turns -= 1
                assert turns > 0, "somebody waits for ever"
            self.store.give_up(1 << 40)
            assert self.store.pinned_bytes == 0
            self.store.close()
            assert self.store.nbytes == 0 and len(self.store) == 0
        finally:
            self.warned.__exit__(None, None, None)
            for each in self.patches:
                each.stop()
            shutil.rmtree(self.folder)


class Sharing(Course):
    share_from = 20


class Packed(Course):
    made, pictures, atol = staticmethod(packed), False, 0.3


class PackedSharing(Packed):
    share_from = 20


class ModelDrafts(Sharing):
    """A model drafts, with a cache of its own; text alone, as it sees nothing."""

    pictures = False

    @staticmethod
    def made() -> tuple[Model, list]:
        model, _ = tiny_model(rms_norm_eps=1e-2)
        return model, [None, Drafting(tiny_model(seed=3)[0], 2)]


for kind, least in ((Course, 8), (Sharing, 8), (Packed, 4), (PackedSharing, 4), (ModelDrafts, 4)):
    kind.TestCase.settings = settings(max_examples=examples(30, 30, least=least), stateful_step_count=25)
TestCourse, TestSharing, TestPacked = Course.TestCase, Sharing.TestCase, Packed.TestCase
TestPackedSharing, TestModelDrafts = PackedSharing.TestCase, ModelDrafts.TestCase
