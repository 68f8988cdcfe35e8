"""The tree of beginnings against all sequences one by one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlx_qwen35.session.tree import Tree, common, key_of
from tests.seeing_model import some_media
from tests.soak import examples

KEY = st.lists(st.integers(-2, 1), max_size=9)


def counted(left: list[int], right: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@given(KEY, KEY)
def test_common(left, right):
    assert common(np.array(left, np.int64), np.array(right, np.int64)) == counted(left, right)


class Course(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree, self.known = Tree(), {}

    @rule(owner=st.integers(0, 9), key=KEY)
    def put(self, owner, key) -> None:
        self.tree.put(owner, np.array(key, np.int64))
        self.known[owner] = key

    @rule(owner=st.integers(0, 9))
    def remove(self, owner) -> None:
        self.tree.remove(owner)
        self.known.pop(owner, None)

    @rule(key=KEY)
    def ask(self, key) -> None:
        found = list(self.tree.meeting(np.array(key, np.int64)))
        assert len(found) == len(self.known)
        assert dict(found) == {owner: counted(key, other) for owner, other in self.known.items()}
        assert [shared for _, shared in found] == sorted((shared for _, shared in found), reverse=True)

    @invariant()
    def is_as_small_as_can_be(self) -> None:
        """Each node below the root is where somebody ends or ways part."""
        assert {owner: self.tree.key(owner).tolist() for owner in self.tree} == self.known
        nodes = list(self.tree._root.children.items())
        while nodes:
            first, node = nodes.pop()
            assert first == node.edge[0] and (node.ends or len(node.children) > 1)
            nodes += node.children.items()


Course.TestCase.settings = settings(max_examples=examples(200), stateful_step_count=30)
TestCourse = Course.TestCase


def test_pictures_count_where_they_begin():
    one, again, other = (some_media("image", 4, 6, seed=seed) for seed in (1, 1, 2))
    tokens = [3, 80, 80, 4]
    plain, shown = key_of(tokens), key_of(tokens, [(1, one), (9, other)])
    assert common(shown, plain) == common(shown, key_of(tokens, [(1, other)])) == 1
    assert (shown == key_of(tokens, [(1, again)])).all() and (shown == key_of(tokens, [(1, one.key)])).all()
    assert shown[[0, 2, 3]].tolist() == [3, 80, 4] and shown[1] < 0
