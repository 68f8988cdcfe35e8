"""What a session with drafts says that it holds is what it keeps alive, whoever drafts and whether it still does."""

import gc

import mlx.core as mx
import pytest

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.model import Model
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.session import Session
from tests.blocks import random_blocks
from tests.checkpoints import tiny_config
from tests.drafted import guessed, random_head
from tests.talkers import PROMPT, greedy


def large_states() -> Model:
    """A state takes 256 KB a layer, so that all else is small beside it."""
    sizes = {"linear_num_value_heads": 16, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    model = Model(ModelConfig.from_dict(tiny_config("dense", flat=True, mtp_num_hidden_layers=1, **sizes)))
    model.take_mtp(random_head(MTPHead(model.config.text)))
    mx.eval(model.parameters())
    return model


MODEL, SMALL, BLOCKS = large_states(), large_states(), random_blocks()


def active() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def talk(session: Session, prompt: list[int], count: int = 40, **options) -> list[int]:
    """The first tokens of an answer, which is then closed, and the prompt before them."""
    with guessed(4):
        stream = greedy(MODEL, prompt, session=session, max_tokens=80, num_draft_tokens=4, **options)
        said = [next(stream).token for _ in range(count)]
        stream.close()
    return [*prompt, *said]


@pytest.mark.parametrize("left", [False, True], ids=["drafting", "not any more"])
@pytest.mark.parametrize("draft_model", [None, SMALL, BLOCKS], ids=["head", "draft model", "blocks"])
def test_bytes_are_what_is_kept_alive(draft_model, left):
    talk(Session(MODEL), PROMPT, draft_model=draft_model)  # what is made once
    before = active()
    session = Session(MODEL, snapshot_bytes=1 << 30)
    session.marks._step = 16
    said = talk(session, PROMPT, draft_model=draft_model)
    if left:
        talk(session, [*said, 5], 3, mtp=False)
    held = active() - before
    assert len(session.marks) >= 3
    assert session.nbytes <= held < 1.05 * session.nbytes


def test_a_budget_for_snapshots_counts_what_a_draft_model_keeps_at_each():
    session = Session(MODEL, snapshot_bytes=1 << 30)
    session.marks._step = 16
    talk(session, PROMPT, draft_model=SMALL)
    states = {id(a): a.nbytes for mark in session.marks for pair in mark.snapshot.delta if pair for a in pair}
    assert session.marks.nbytes > 1.9 * sum(states.values())
    few = Session(MODEL, snapshot_bytes=session.marks.nbytes * 6 // len(session.marks))
    few.marks._step = 4
    talk(few, PROMPT, draft_model=SMALL)
    assert 5 <= few.marks.most <= 6
