"""The store: nothing is computed twice, whoever asks for it, and bytes are those that are held."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import KVCache, StretchedKVCache
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.model import Model
from mlx_qwen35.processor import Prompt
from mlx_qwen35.session import Session, beginnings, paths
from mlx_qwen35.session.store import Store
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.session.rows import Row, answered, fresh, together
from tests.tiny_model import some_tokens, tiny_model

MODEL, _ = seeing_model(rms_norm_eps=1e-2)
TRUNK = some_tokens(1500, vocab=80)


def asked(*parts: list[int] | int, turns: tuple[int, ...] = ()) -> Prompt:
    tokens = [token for part in parts for token in (part if isinstance(part, list) else [part])]
    return Prompt(tokens, None, False, (), turns or (0, len(tokens) - 1))


@pytest.fixture
def store():
    return Store(MODEL, most_bytes=1 << 30)


def test_eight_at_once_compute_their_beginning_once(store):
    prompts = [asked(TRUNK, some_tokens(20 + n, seed=n, vocab=80)) for n in range(8)]
    rows = together(store, prompts, 3)
    assert sum(row.computed for row in rows) == 1500 + sum(len(prompt.tokens) - 1500 for prompt in prompts)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.said == answered(Store(MODEL, most_bytes=0), prompt, 3).said
    assert len(store) == 8


def test_a_copy_has_the_bits_that_a_row_has_alone(store):
    one, two = asked(TRUNK[:200], 1, 2, 3), asked(TRUNK[:200], 4, 5)
    leader = Row(store, one)
    leader.begin()
    leader.step()
    follower = Row(store, two)
    assert not follower.begin() and leader.session.meetings == [200, 202]
    while not follower.begin():
        leader.step()
    assert all(isinstance(layer, KVCache) for layer in leader.session.cache.layers if layer.size())
    alone = Session(MODEL)
    alone.go_on(two)
    cache, at = alone.cache, 0
    for stop in (64, 128, 192, 200, 202):
        logits = MODEL(mx.array([two.tokens[at:stop]]), cache)[0, -1]
        at = stop
    while not follower.step():
        pass
    assert (np.array(logits) == np.array(follower.logits)).all()
    assert follower.computed == 2 and leader.session.cache.offset == 200


def test_nobody_waits_for_little(store):
    leader = Row(store, asked(TRUNK[:300]), chunk=16)
    leader.begin()
    assert store.begin(asked(TRUNK[:63], 1)) is not None
    assert store.begin(asked(TRUNK[:64], 1, 2)) is None
    assert leader.session.meetings == [64, 299]
    for _ in range(5):
        leader.step()
    assert leader.session.cache.offset == 80 - 16 + 0 or leader.session.cache.offset > 64
    assert store.begin(asked(TRUNK[:90], 1)).cache.offset == 64  # 26 to gain


def test_no_snapshot_where_one_is_near(store):
    leader = Row(store, asked(TRUNK[:300], turns=(0, 100, 290)))
    leader.begin()
    assert store.begin(asked(TRUNK[:300])) is None and store.begin(asked(TRUNK[:130], 1)) is None
    assert leader.session.meetings == [100, 290]
    assert store.begin(asked(TRUNK[:250], 1)) is None
    assert leader.session.meetings == [100, 250, 290]


def test_who_waits_for_a_row_that_fails_computes_itself(store):
    leader, prompt = Row(store, asked(TRUNK[:300])), asked(TRUNK[:200], 1)
    leader.begin()
    leader.step()
    assert store.begin(prompt) is None
    leader.fail()
    assert leader.session.tokens == [] and store.nbytes == 0
    assert store.begin(prompt).cache.offset == 0


def test_one_that_is_cancelled_gives_what_it_has(store):
    leader, prompt = Row(store, asked(TRUNK[:300])), asked(TRUNK[:200], 1)
    leader.begin()
    leader.step()
    assert store.begin(prompt) is None
    leader.end()
    session = store.begin(prompt)
    assert session is leader.session and session.cache.offset == 64


def test_a_row_that_nobody_holds_any_more_is_forgotten(store):
    leader = Row(store, asked(TRUNK[:300]))
    leader.begin()
    leader.step()
    del leader
    gc.collect()
    assert store.begin(asked(TRUNK[:300])) is not None and len(store) == 1
    assert store.begin(asked(TRUNK[:300])) is not None  # that one, too


def test_from_its_very_end_a_path_is_taken_over(store):
    first = answered(store, asked(TRUNK[:100]), 5)
    longer = asked(first.session.tokens, 1, 2)
    second = answered(store, longer)
    assert second.session is first.session and second.computed == 2 and len(store) == 1
    np.testing.assert_allclose(np.array(second.logits), fresh(MODEL, longer), atol=1e-3)
    held = store.begin(asked(longer.tokens, 3))
    other = store.begin(asked(longer.tokens, 4))
    assert held is second.session and other is not held
    assert other.cache.offset == held.marks.last(107).offset == 106


def test_a_prompt_that_comes_again_is_computed_from_its_last_turn(store):
    first, again = answered(store, asked(TRUNK[:100]), 5), answered(store, asked(TRUNK[:100]), 5)
    assert again.computed == 1 and again.said == first.said and again.session is not first.session


@pytest.mark.parametrize("form", [None, KVFormat(8, 32, 70)])
def test_from_some_length_on_keys_are_shared(monkeypatch, form):
    monkeypatch.setattr(paths, "SHARE_FROM", 1000)
    model, _ = tiny_model(head_dim=32, rms_norm_eps=1e-2, rope_parameters={"mrope_section": [4, 2, 2]})
    model.kv_form = form
    store = Store(model, most_bytes=1 << 30)
    leader = Row(store, asked(TRUNK, 1, 2, 3), chunk=512)
    leader.begin()
    leader.step()
    prompts = [asked(TRUNK, 4, n) for n in range(5)]
    assert store.begin(prompts[0]) is None
    while leader.session.cache.offset < 1500:
        leader.step()
    layers = [type(layer) for layer in leader.session.cache.layers]
    alone, rows = store.nbytes, []
    for prompt in prompts:
        rows.append(Row(store, prompt))
        assert rows[-1].begin()
    assert [type(layer) for layer in leader.session.cache.layers] == layers
    keys = sum(layer.nbytes for layer in leader.session.cache.layers if layer.size())
    assert alone + 0.6 * keys < store.nbytes < alone + 1.1 * keys
    while not leader.step():
        pass
    for row, prompt in zip(rows, prompts, strict=True):
        while not row.step():
            pass
        assert row.computed == 2
        if form is None:
            np.testing.assert_allclose(np.array(row.logits), fresh(model, prompt), atol=1e-3)
    leader.end()
    idle = store.begin(asked(TRUNK, 1, 5))  # of one that nobody uses, without a copy
    assert idle.cache.offset == 1501 or idle.cache.offset == 1500


def test_a_long_path_of_which_only_an_answer_is_lost_is_taken_over(monkeypatch, store):
    monkeypatch.setattr(beginnings, "SHARE_FROM", 50)
    first = answered(store, asked(TRUNK[:100]), 5)
    session = store.begin(asked(TRUNK[:100], 1, 2))
    assert session is first.session and session.tokens == TRUNK[:99] and len(store) == 1
    assert all(isinstance(layer, KVCache) for layer in session.cache.layers if layer.size())


def test_pictures_count_and_not_their_size(store):
    one, other = some_media("image", 8, 8, seed=1), some_media("image", 8, 8, seed=2)

    def shows(*parts, seed=1):
        tokens, media = prompt_of(*parts, seed=seed)
        return Prompt(tokens, None, False, tuple(media), turns=(0, 70, len(tokens) - 1))

    first = answered(store, shows(70, one, 80, 5), 3)
    assert answered(store, shows(70, other, 80, 5)).computed == 16 + 80 + 5
    assert answered(store, shows(70, some_media("image", 8, 8, seed=1), 80, 5)).computed == 1
    assert answered(store, Prompt(first.prompt.tokens[:75], None, False)).computed == 5
    rows = together(store, [shows(90, one, 80, 1, seed=2), shows(90, one, 80, 1, other, 3, seed=2)])
    assert [row.computed for row in rows] == [90 + 16 + 80 + 1, 1 + 16 + 3]
    for row in rows:
        np.testing.assert_allclose(np.array(row.logits), fresh(MODEL, row.prompt), atol=1e-3)


def test_a_snapshot_inside_a_picture(store):
    picture = some_media("image", 32, 16, seed=1)  # 128 tokens
    tokens, media = prompt_of(10, picture, 5)
    prompt = Prompt(tokens, None, False, tuple(media))
    leader = Row(store, prompt, chunk=40)
    leader.begin()
    leader.step()
    leader.end()
    row = answered(store, prompt)
    assert row.session is leader.session and row.computed == len(tokens) - 40
    np.testing.assert_allclose(np.array(row.logits), fresh(MODEL, prompt), atol=1e-3)


def test_a_callers_own_session_is_given_the_beginning(store):
    first = answered(store, asked(TRUNK[:300]), 2)
    own = Session(MODEL)
    row = answered(store, asked(TRUNK[:250], 1), own=own)
    assert row.computed == 251 and row.session is own  # 299 is the only mark
    row = answered(store, asked(TRUNK[:299], 2, 3), own=own)
    assert row.computed == 51  # not for 50
    row = answered(store, asked(TRUNK[:200], 1), own=own)
    row = answered(store, asked(TRUNK[:299], 2, 3), own=own)
    assert row.computed == 2 and own.marks.last(299).offset == 299
    row = answered(store, asked(TRUNK[:299], 2, 3, 4), own=own)
    assert row.computed == 1
    assert own not in [path.session for path in store._tree] and first.session.cache.offset == 302
    np.testing.assert_allclose(np.array(row.logits), fresh(MODEL, row.prompt), atol=1e-3)


def test_callers_own_sessions_give_each_other_their_system_message(store):
    prompts = [asked(TRUNK[:200], some_tokens(40, seed=n, vocab=80), turns=(0, 200, 239)) for n in range(3)]
    rows = together(store, prompts[:2], own=None)
    assert sum(row.computed for row in rows) == 200 + 40 + 40
    store.clear()
    own = [Session(MODEL) for _ in range(3)]
    assert answered(store, prompts[0], own=own[0]).computed == 240
    assert [len(path.session.tokens) for path in store._tree] == [200]
    assert answered(store, prompts[1], own=own[1]).computed == 40
    assert answered(store, prompts[2]).computed == 40
    rows = [Row(store, asked(TRUNK[300:500], n), own=Session(MODEL)) for n in range(2)]
    assert rows[0].begin() and not rows[1].begin()


def broad() -> Model:
    """A model with arrays so large that 16 KB, which MLX may keep behind a copy, are little."""
    sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_value_heads": 12}
    return tiny_model(**sizes)[0]


def held(store: Store) -> int:
    """What MLX really holds of it: what is free when it is cleared."""
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    store.clear()
    gc.collect()
    return before - mx.get_active_memory()


@pytest.mark.parametrize("ends", [(100, 900, 1300), (40, 41, 42)])
def test_bytes_are_what_mlx_holds(ends):
    store = Store(broad(), most_bytes=1 << 30)
    for n, end in enumerate(ends):
        answered(store, asked(TRUNK[:end], n, turns=(0, end // 2, end)), 3)
    answered(store, asked(TRUNK[: ends[1]], 9))
    counted = store.nbytes
    assert 0.97 * counted <= held(store) <= 1.03 * counted
    assert store.nbytes == 0


def test_what_is_given_up_is_really_free():
    store = Store(broad(), most_bytes=1 << 30)
    for n in range(4):
        answered(store, asked(TRUNK[: 300 * n + 300], n, turns=(0, 200, 300 * n + 299)), 20)
    while store.nbytes:
        gc.collect()
        active, counted = mx.get_active_memory(), store.nbytes
        freed = store.give_up(1)
        gc.collect()
        assert freed > 0 and store.nbytes == counted - freed
        assert abs(active - mx.get_active_memory() - freed) <= 0.03 * counted
    assert store.give_up(10) == 0


def test_what_was_used_longest_ago_goes_first_from_its_end(store):
    a, b = ([*TRUNK[:200], *some_tokens(200, seed=n, vocab=80)] for n in (1, 2))
    rows = [answered(store, asked(tokens, turns=(0, 200, 399)), 20) for tokens in (a, b)]
    one, two = [row.session for row in rows]
    order = []
    while store.give_up(1):
        order.append((len(one.tokens) if any(p.session is one for p in store._tree) else 0, len(two.tokens)))
    # The answer of the first; its prompt and all of it, since the other has the trunk; then the other.
    assert order == [(399, 420), (0, 420), (0, 399), (0, 200), (0, 200)]
    answered(store, asked(TRUNK[:300]), 5)


def test_a_mark_that_was_used_outlives_what_lies_behind_it(store):
    answered(store, asked(TRUNK[:200], 1, turns=(0, 150, 200)), 20)  # used last through its mark at 150
    answered(store, asked(TRUNK[700:1000]), 20)
    kept = store.begin(asked(TRUNK[:150], 2))
    assert kept.cache.offset == 150
    store.drop(kept)
    while len(store) == 2:
        store.give_up(1)
    (path,) = store._tree
    assert path.session.tokens == TRUNK[:150]


def test_marks_on_the_way_go_before_anything_else(monkeypatch):
    model, _ = tiny_model(rms_norm_eps=1e-2)
    store = Store(model, most_bytes=1 << 30)
    row = Row(store, asked(TRUNK, turns=(0, 100, 1499)), chunk=100)
    row.begin()
    row.session.marks._step = 128
    while not row.step():
        pass
    row.end()
    offsets = [mark.offset for mark in row.session.marks]
    assert len(offsets) > 5 and offsets[0] == 100
    store.give_up(1)
    assert [mark.offset for mark in row.session.marks] == [100, 1499] and row.session.tokens == TRUNK


def test_what_is_in_use_is_never_taken(store):
    row = Row(store, asked(TRUNK[:300]))
    row.begin()
    row.step()
    other = answered(store, asked(TRUNK[400:600]))
    pinned = store.pinned_bytes
    assert 0 < pinned < store.nbytes
    store.most_bytes = 0
    store.give_up(1 << 40)
    store.clear()
    assert store.nbytes == store.pinned_bytes == pinned and len(store) == 1 and not other.session.in_use
    while not row.step():
        pass
    np.testing.assert_allclose(np.array(row.logits), fresh(MODEL, row.prompt), atol=1e-3)
    row.end()
    assert store.nbytes == 0


def test_with_no_budget_rows_still_share(monkeypatch):
    store = Store(MODEL, most_bytes=0)
    rows = together(store, [asked(TRUNK[:500], n, 7) for n in range(4)], 4)
    assert sum(row.computed for row in rows) == 500 + 4 * 2
    assert store.nbytes == 0 and len(store) == 0


def test_a_budget_smaller_than_a_path_keeps_what_fits():
    store = Store(MODEL, most_bytes=1 << 30)
    answered(store, asked(TRUNK[:300], turns=(0, 200, 299)), 20)
    whole = store.nbytes
    store = Store(MODEL, most_bytes=whole - 1)
    row = answered(store, asked(TRUNK[:300], turns=(0, 200, 299)), 20)
    assert row.session.tokens == TRUNK[:299] and 0 < store.nbytes < whole


def test_it_refuses_what_means_nothing():
    with pytest.raises(ArgumentError, match="most_bytes"):
        Store(MODEL, most_bytes=-1)
    with pytest.raises(ArgumentError, match="amount"):
        Store(MODEL, most_bytes=1).give_up(-1)


def test_the_caches_of_a_copy_are_its_own(store):
    first = answered(store, asked(TRUNK[:300]), 3)
    before = [np.array(array) for array in first.session.cache.arrays()]
    answered(store, asked(TRUNK[:299], 3, 4), 10)
    for array, kept in zip(first.session.cache.arrays(), before, strict=True):
        assert (np.array(array) == kept).all()
    assert not any(isinstance(layer, StretchedKVCache) for layer in first.session.cache.layers)


def test_pixels_count_as_long_as_they_are_needed(store):
    picture = some_media("image", 8, 8, seed=1)
    tokens, media = prompt_of(70, picture, 80)
    row = answered(store, Prompt(tokens, None, False, tuple(media), turns=(0, 70, 100)))
    assert store.nbytes == row.session.nbytes + picture.rows.nbytes
    while row.session.cache.offset > 70:
        store.give_up(1)
    assert row.session.shown == [] and store.nbytes == row.session.nbytes


def test_pixels_are_not_kept_for_one_that_never_began(store):
    leader = Row(store, asked(TRUNK[:300]))
    leader.begin()
    tokens, media = prompt_of(some_media("image", 8, 8, seed=1))
    waiting = Prompt([*TRUNK[:300], *tokens], None, False, tuple(media))
    assert store.begin(waiting) is None
    pixels = weakref.ref(media.pop())
    del waiting
    assert store.begin(asked(TRUNK[700:800])) is not None
    gc.collect()
    assert pixels() is None
