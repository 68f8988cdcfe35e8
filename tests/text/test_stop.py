"""Stop strings: nothing of one is ever shown, however the text is cut."""

import hypothesis
import hypothesis.strategies as st
import pytest

from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.stop import StopStrings


def run(stops, pieces):
    stream, shown, stopped = StopStrings(stops), "", False
    for piece in pieces:
        text, stopped = stream.feed(piece)
        shown += text
    return shown + stream.finish(), stopped


def test_text_before_the_stop_is_shown_at_once():
    stream = StopStrings(["END"])
    assert stream.feed("some E") == ("some ", False)
    assert stream.feed("N") == ("", False)
    assert stream.feed("NE") == ("ENN", False)
    assert stream.feed("ND, more") == ("", True)
    assert StopStrings(["END"]).feed("a END b") == ("a ", True)


def test_what_was_held_back_comes_at_the_end():
    assert run(["END"], ["xE", "N"]) == ("xEN", False)


def test_nothing_is_shown_after_a_stop():
    stream = StopStrings("\n\n")
    assert stream.feed("a\n\nb") == ("a", True)
    assert stream.feed("c") == ("", True)
    assert stream.finish() == ""


def test_the_stop_that_is_complete_first_counts():
    assert run(["abcd", "bc"], ["xabcd"]) == ("xa", True)
    assert run(["abc", "c"], ["xabc"]) == ("x", True)


@pytest.mark.parametrize(
    ("stops", "text", "which"),
    [
        (["abcd", "bc"], "xabcd", "bc"),
        (["c", "abc"], "xabc", "abc"),
        (["END", "\n"], "a\nEND", "\n"),
        (["b"], "a", None),
    ],
)
def test_it_knows_which_stop_it_was(stops, text, which):
    for pieces in ([text], list(text)):
        stream = StopStrings(stops)
        for piece in pieces:
            stream.feed(piece)
        assert stream.stop == which


def test_no_stops_hold_nothing_back():
    assert StopStrings([]).feed("abc") == ("abc", False)


@pytest.mark.parametrize("stops", ["", ["a", ""], [3]])
def test_a_stop_string_must_be_text(stops):
    with pytest.raises(PromptError):
        StopStrings(stops)


@hypothesis.given(st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.lists(st.text("ab<", max_size=4)))
def test_any_cut_shows_the_same(stops, pieces):
    text = "".join(pieces)
    shown, stopped = run(stops, pieces)
    assert (shown, stopped) == run(stops, [text]) == run(stops, list(text))
    assert text.startswith(shown) and not any(stop in shown for stop in stops)
    assert stopped == any(stop in text for stop in stops)
