"""Ctrl-C anywhere in what the store does: nothing that it gives afterwards is wrong, and nothing is held for ever."""

import gc
import random
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.session import Session, beginnings, paths
from mlx_qwen35.session.store import Store
from tests.experts.interrupts import Interrupt
from tests.session.rows import Row, answered, fresh
from tests.session.test_store import TRUNK, asked
from tests.soak import examples
from tests.tiny_model import tiny_model

MODEL, _ = tiny_model(rms_norm_eps=1e-2)
LONG, OTHER = asked(TRUNK[:120], turns=(0, 70, 119)), asked(TRUNK[:90], 1, 2, turns=(0, 70, 91))


class Case:
    """A store with a path, a row in use and a file; `work` is what is interrupted."""

    def __init__(self, folder, how: str) -> None:
        self.store = Store(MODEL, most_bytes=1 << 30, directory=folder)
        self.path = answered(self.store, LONG, 6)
        self.row = Row(self.store, asked(TRUNK[:70], TRUNK[300:400], turns=(0, 70, 169)))
        assert self.row.begin()
        self.row.step()
        self.own, self.session = Session(MODEL), None
        self.work = getattr(self, how)
        if how == "read":
            self.store.clear()
            self.store._shelf._behind.wait()
            self.store._catch_up()

    def copy(self) -> None:
        self.session = self.store.begin(OTHER)

    read = copy

    def take_over(self) -> None:
        self.session = self.store.begin(asked(self.path.session.tokens, 3, 4))

    def seed(self) -> None:
        self.store.seed(self.own, OTHER)

    def settle(self) -> None:
        self.row.end()

    def cut(self) -> None:
        while self.store.give_up(1):
            pass

    def drop(self) -> None:
        self.row.fail()


WORK = ["copy", "read", "take_over", "seed", "settle", "cut", "drop"]


@pytest.mark.parametrize("how, share_from", [*((how, 8192) for how in WORK), ("copy", 20), ("cut", 20)])
def test_an_interrupt_anywhere(tmp_path, monkeypatch, how, share_from):
    monkeypatch.setattr(paths, "SHARE_FROM", share_from)
    monkeypatch.setattr(beginnings, "SHARE_FROM", share_from)
    monkeypatch.setattr("mlx_qwen35.conversion.write.flush", lambda handle: None)
    case = Case(tmp_path / "whole", how)
    with Interrupt() as points:
        case.work()
    case.store.close()
    assert points.count > 10
    for number, at in enumerate(random.Random(1).sample(range(points.count), examples(5, 2, least=3))):
        folder = tmp_path / str(number)
        case = Case(folder, how)
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            case.work()
            raise KeyboardInterrupt  # it was one of what the thread or a measure decides
        found = case.store
        case.session = None
        if case.row._using is not None and case.row.session is not None and how not in ("settle", "drop"):
            while not case.row.step():
                pass
            np.testing.assert_allclose(np.array(case.row.logits), fresh(MODEL, case.row.prompt), atol=1e-3)
        found.settled(case.row.session)
        found.settled(case.own)
        for own in (None, case.own):
            for prompt in (OTHER, LONG, asked(TRUNK[:110], 5), asked(TRUNK[:70], TRUNK[300:400], 1), OTHER):
                row = answered(found, prompt, 2, own=own)
                whole = MODEL(mx.array([[*prompt.tokens, *row.said]]))[0, -1]
                np.testing.assert_allclose(np.array(row.logits), np.array(whole), atol=1e-3)
        del row
        case.row = case.path = None
        gc.collect()
        found._catch_up()
        assert not [path for path in found._tree if path.asked is not None]
        found.give_up(1 << 40)
        found.close()
        assert found.nbytes == 0 and len(found) == 0
        shutil.rmtree(folder)
