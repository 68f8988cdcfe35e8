"""The chat of notebooks: what is shown while it comes, what is kept, and that no interrupt anywhere spoils it."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlx_qwen35
from mlx_qwen35 import Chat, Completion, PromptError, Reply, Sampling, load
from mlx_qwen35.errors import SessionError
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.notebook import shell, views
from mlx_qwen35.notebook.chat import _media, _text
from mlx_qwen35.notebook.progress import ProgressBar
from mlx_qwen35.notebook.thumbnails import data_urls, frame
from mlx_qwen35.speculative.copying import Copying
from mlx_qwen35.speculative.text import Texts
from mlx_qwen35.text.reply import ContentDelta, ReasoningDelta
from tests.conftest import CHECKOUT
from tests.soak import examples
from tests.speakers import checkpoint, encoded, seeing, speak  # noqa: F401

# ruff: noqa: F811 - fixtures
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """A notebook without IPython: the displays, and of each what it has shown one after the other."""
    displays: list[list[dict[str, str]]] = []

    def show(bundle: dict[str, str], *, updatable: bool = False) -> list[dict[str, str]]:
        displays.append([bundle])
        return displays[-1]

    monkeypatch.setattr(shell, "is_rich", lambda: True)
    monkeypatch.setattr(shell, "running", lambda: SimpleNamespace(kernel=None, execution_count=7))
    monkeypatch.setattr(shell, "show", show)
    monkeypatch.setattr(shell, "update", lambda handle, bundle: handle.append(bundle))
    monkeypatch.setattr(views, "REDRAW_SECONDS", 0.0)
    return displays


@pytest.fixture
def talk(speak: Any, screen: Any) -> Any:
    """talk("reply", ..., tools=...) -> a Chat with a model that says that."""

    def talk(*replies: str, **options: Any) -> Chat:
        said = speak(*replies)
        return Chat(said.model, said.processor, **{"enable_thinking": False, "sampling": Sampling(), **options})

    return talk


class TestAnswers:
    def test_it_comes_in_one_display_and_is_kept(self, talk: Any, screen: Any) -> None:
        chat = talk("hello the hello", "the")
        reply = chat.send("one")
        assert (reply.text, str(reply), reply.reasoning, reply.finish_reason) == (
            "hello the hello", "hello the hello", "", "stop",
        )  # fmt: skip
        (shown,) = screen
        texts = [bundle["text/plain"] for bundle in shown]
        assert texts[0] == "" and texts[-1] == "hello the hello" and len(set(texts)) > 2
        assert all("hello the hello".startswith(text) for text in texts)
        assert shown[-1]["text/markdown"].startswith("hello the hello\n\n<details><summary>")
        assert reply.statistics["generation_tokens"] > 2 and "peak memory" in shown[-1]["text/markdown"]
        assert chat.send("two").text == "the" and chat.last.text == "the"
        assert chat.history == [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "hello the hello"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "the"},
        ]
        assert chat.last.statistics["cached_tokens"] > 0

    def test_redraws_are_few(self, talk: Any, screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(views, "REDRAW_SECONDS", 3600.0)
        talk("hello the hello").send("one")
        assert len(screen[0]) <= 3 and screen[0][-1]["text/plain"] == "hello the hello"

    def test_the_longer_an_answer_the_fewer_are_its_redraws(self, screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """All of it is drawn each time."""
        now = 100.0
        monkeypatch.setattr(views, "REDRAW_SECONDS", 0.1)
        monkeypatch.setattr(views, "time", SimpleNamespace(perf_counter=lambda: now))
        view = views.RichView(())
        for length, wait in ((0, 0.1), (views.REDRAW_CHARACTERS, 0.1), (3 * views.REDRAW_CHARACTERS, 0.3)):
            view._length = length
            view._draw("")
            now += 0.99 * wait
            assert not view._due()
            now += 0.02 * wait
            assert view._due()

    def test_reasoning_is_open_while_it_comes_and_folded_then(self, talk: Any, screen: Any) -> None:
        chat = talk("why <b>\n\n  not</think>\n\nhello", "the", enable_thinking=True)
        reply = chat.send("one")
        assert (reply.reasoning, reply.text) == ("why <b>\n\n  not", "hello")
        markdown = [bundle["text/markdown"] for bundle in screen[0]]
        assert any(text.startswith("<details open><summary>Reasoning ...</summary>why") for text in markdown)
        assert markdown[-1].startswith("<details><summary>Reasoning (3 words)</summary>why &#60;b&#62;<br><br>  not</")
        assert chat.send("two", enable_thinking=False).reasoning == ""

    def test_shown_once(self, talk: Any, screen: Any) -> None:
        """The value of a cell is shown by IPython: not the answer that this very cell has shown."""
        chat = talk("hello", "the")
        reply = chat.send("one")
        reply._ipython_display_()
        assert len(screen) == 1
        shell.running = lambda: SimpleNamespace(kernel=None, execution_count=8)
        reply._ipython_display_()
        assert len(screen) == 2 and screen[1][0]["text/markdown"] == reply._repr_markdown_()

    def test_an_answer_that_is_cut_says_so(self, talk: Any, screen: Any, capsys: pytest.CaptureFixture[str]) -> None:
        reply = talk("hello the hello the", max_tokens=3).send("one")
        assert reply.finish_reason == "length" and "cut after 3 tokens: a larger max_tokens=" in reply.markdown()
        assert screen[-1][-1]["text/markdown"] == reply.markdown()
        reply = talk("why the why the", max_tokens=2, enable_thinking=True).send("one")
        assert "cut after 2 tokens, before an answer: thinking_budget= leaves room for one" in reply.markdown()
        talk("hello the hello the", max_tokens=3, display="text").send("one")
        assert "\n(cut after 3 tokens: a larger max_tokens=" in capsys.readouterr().out
        assert "cut" not in talk("hello").send("one").markdown()

    def test_reasoning_has_a_budget(self, talk: Any) -> None:
        chat = talk("why\n</think>\n\nhello", "why\n</think>\n\nhello", enable_thinking=True, thinking_budget=1)
        assert chat.send("one").reasoning.endswith("based on the thinking directly now.")
        assert chat.send("two", thinking_budget=None).reasoning == "why"
        assert len(chat.history) == 4

    def test_prefill_is_shown(self, talk: Any, screen: Any) -> None:
        talk("hello", chunk_size=4).send("one " * 20)
        assert any(bundle["text/markdown"].startswith("Reading the prompt: 4 of ") for bundle in screen[0])

    def test_pictures_are_shown_as_the_model_sees_them(self, seeing: Any, screen: Any, encoded: Any) -> None:
        model, processor = mlx_qwen35.load(seeing)
        chat = Chat(model, processor, max_tokens=3, enable_thinking=False)
        picture = Image.new("RGB", (24, 16), (200, 30, 60))
        reply = chat.send("what is it", images=[picture], videos=[[picture] * 4])
        (head,), _ = screen
        assert head["text/markdown"].count('<img src="data:image/jpeg;base64,') == 1 + 2
        (image, video) = reply.media
        assert len(data_urls(video)) == video.grid[0] == 2 and frame(image).shape[2] == 3
        assert np.abs(frame(image).astype(int) - (200, 30, 60)).max() <= 1
        assert reply._repr_markdown_().startswith("<img ") and len(encoded) == 2
        chat.send("and now")
        assert len(encoded) == 2, "what was seen once is not encoded again"

    def test_frames_are_put_together_as_they_were(self, seeing: Any) -> None:
        pixels = np.random.RandomState(0).randint(0, 256, (32, 48, 3), np.uint8)
        _, processor = mlx_qwen35.load(seeing)
        content = [{"type": "image", "image": pixels}]
        (message,) = processor.prepare([{"role": "user", "content": content}])
        medium = message["content"][0]["image"]
        assert medium.grid[1] * 4 == 32 and np.array_equal(frame(medium), pixels)
        values = type(medium)("image", medium.pixels, medium.grid)  # without levels
        assert np.abs(frame(values).astype(int) - pixels).max() <= 2

    def test_tools(self, talk: Any, screen: Any) -> None:
        chat = talk(CALL, "hello", "the", tools=[ADD])
        reply = chat.send("one")
        (call,) = reply.tool_calls
        assert (call.name, call.arguments, reply.text) == ("add", {"a": 3}, "")
        assert '"name": "add"' in screen[0][-1]["text/markdown"]
        assert screen[0][-1]["text/plain"] == 'add({"a": 3})'
        for results in ((), ("4", "5")):
            with pytest.raises(PromptError, match="results for 1 tool calls"):
                chat.send_results(*results)
        assert chat.send_results({"sum": 4}).text == "hello"
        assert chat.history[2] == {"role": "tool", "content": '{"sum": 4}'}
        with pytest.raises(PromptError, match="1 results for 0"):
            chat.send_results("4")
        assert "**Result**" in chat._repr_markdown_()

    def test_undo_regenerate_and_reset(self, talk: Any) -> None:
        chat = talk("hello", "the", "he")
        chat.send("one")
        kept = chat.history
        chat.send("two")
        chat.undo()
        assert chat.history == kept
        assert chat.send("other").text == "the" and chat.regenerate(max_tokens=1).finish_reason in ("stop", "length")
        assert [message["content"] for message in chat.history][:3] == ["one", "hello", "other"]
        assert len(chat.history) == 4
        chat.reset()
        assert chat.history == [] and chat.last is None
        with pytest.raises(PromptError, match="nothing was asked"):
            chat.regenerate()
        assert chat.send("one").text == "hello"

    def test_what_makes_no_prompt_leaves_it_as_it_was(self, talk: Any) -> None:
        chat = talk("hello", "the")
        chat.send("one")
        kept = chat.history
        for wrong in ({"images": ["no/such.png"]}, {"images": "no/such.png"}, {"videos": [b"x"]}):
            with pytest.raises(PromptError):
                chat.send("two", **wrong)
        with pytest.raises(PromptError):
            chat.send("two " * 30_000)
        assert chat.history == kept and chat.send("two").text == "the"

    def test_a_completion_of_a_batch_renders_itself(self) -> None:
        made = Completion("", (1,), (ReasoningDelta("why"), ContentDelta("<b>hello")), 1, "stop")
        assert made._repr_markdown_().startswith("<details><summary>Reasoning (1 words)</summary>why</details>")
        assert "&lt;b>hello" in made._repr_markdown_()


class TestPlaces:
    def test_a_program_prints_nothing(self, speak: Any, capsys: pytest.CaptureFixture[str]) -> None:
        said = speak("hello", "the")
        chat = Chat(said.model, said.processor, enable_thinking=False)
        assert chat.send("one").text == "hello" and capsys.readouterr().out == ""
        chat = Chat(said.model, said.processor, enable_thinking=False, display="text")
        assert chat.send("one").text == "hello" and capsys.readouterr().out == "hello\n"
        with pytest.raises(ValueError, match="choose auto, rich, text, off"):
            Chat(said.model, said.processor, display="colour")

    def test_rich_without_ipython(self, speak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "IPython.display", None)
        said = speak("hello")
        chat = Chat(said.model, said.processor, enable_thinking=False, display="rich")
        with pytest.raises(shell.DisplayError, match=r"pip install ipython"):
            chat.send("one")
        assert chat.history == []

    def test_in_ipython(self, speak: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """A real shell: text while it comes, and the value of a cell is not printed again."""
        interactive = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
        said = speak("hello", "the")
        shell_class = interactive.InteractiveShell
        running = shell_class.instance()
        try:
            running.user_ns["chat"] = Chat(said.model, said.processor, enable_thinking=False)
            assert running.run_cell("chat.send('one')", store_history=True).success
            assert capsys.readouterr().out in ("hello\n", "hello\nOut[1]: ")
            running.run_cell("chat.last.text", store_history=True)
            assert capsys.readouterr().out.endswith("'hello'\n")
            from IPython.utils.capture import capture_output

            running.user_ns["chat"]._display = "rich"
            with capture_output() as captured:
                assert running.run_cell("reply = chat.send('two')\nreply", store_history=True).success
            shown = [out.data["text/markdown"] for out in captured.outputs]
            assert shown[0] == "" and shown[-1].startswith("the\n\n<details>")
            with capture_output() as captured:
                running.run_cell("reply", store_history=True)
            assert captured.outputs[0].data["text/markdown"].startswith("the\n\n<details>")
        finally:
            shell_class.clear_instance()


class TestInterrupts:
    def test_ctrl_c(self, talk: Any, screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first Ctrl-C ends the answer in good order: it is in the history, and the cell ends."""
        chat = talk("hello the hello the hello", "the")
        show = views.RichView.show

        def press(view: Any, part: Any) -> None:
            show(view, part)
            if len(view._parts) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(views.RichView, "show", press)
            with pytest.raises(KeyboardInterrupt):
                chat.send("one")
        assert chat.last.finish_reason == "cancelled" and "hello the hello the hello".startswith(chat.last.text)
        assert chat.history[-1]["content"] == chat.last.text != ""
        assert "*(interrupted)*" in screen[0][-1]["text/markdown"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert chat.send("two").text == "the"

    def test_a_new_answer_that_is_interrupted_at_once_leaves_the_old(
        self, talk: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat = talk("hello", "the")
        chat.send("one")

        def interrupted(*arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(chat._talk._model), "hidden", interrupted)
            chat.regenerate()
        assert [message["content"] for message in chat.history] == ["one", "hello"]
        assert chat.regenerate().text == "hello"

    def test_at_every_point(self, seeing: Any, screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A KeyboardInterrupt at lines all over the package, while a picture is read, encoded, prefilled and asked
        about: what is asked next is answered as if nothing had been."""
        # Copies whatever they cost: otherwise it is a matter of time which lines run.
        monkeypatch.setattr(Copying, "choose", lambda self, kind, most, otherwise=None: min(3, most))
        model, processor = mlx_qwen35.load(seeing)
        picture = Image.fromarray(np.random.RandomState(1).randint(0, 256, (16, 24, 3), np.uint8))
        other = Image.fromarray(np.random.RandomState(2).randint(0, 256, (16, 24, 3), np.uint8))
        options = {"max_tokens": 3, "sampling": Sampling(), "enable_thinking": False, "chunk_size": 9}

        def begin() -> Chat:
            Texts.of(model).clear()  # what copies are made from, and which lines that takes, hangs on this chat alone
            chat = Chat(model, processor, **options)
            chat.send("hello", images=[other])
            return chat

        def ask(chat: Chat) -> None:
            chat.send("what is it", images=[picture])

        ask(begin())  # so that nothing is done for the first time
        whole = begin()
        first = said_in(whole)
        with Lines() as lines:
            ask(whole)
        asked = said_in(whole)
        points = sorted(random.Random(0).sample(range(lines.count), examples(24, 2)))
        points += range(lines.count - 6, lines.count)
        in_history = 0
        for point in points:
            chat = begin()
            with pytest.raises(KeyboardInterrupt), Lines(point):
                ask(chat)
            said = said_in(chat)
            assert said[:2] == first and len(said) in (2, 4)
            if len(said) == 4:
                in_history += 1
                assert said[2] == asked[2] and asked[3][-1].startswith(said[3][-1])
            reply = chat.send("and now", images=[picture])
            prompt = chat.history[:-1]
            expected = [part.content for part in stream_generate(model, processor, prompt, **options)]
            assert reply.text == "".join(expected), f"line {point} of {lines.count}"
        assert 3 < in_history < len(points) - 3


def said_in(chat: Chat) -> list[list[str]]:
    """Of each message: its role, what it shows, and its text."""
    return [
        [message["role"], *(medium.key for medium in _media([message])), _text(message)] for message in chat.history
    ]


class Lines:
    """Counts the lines of the package that run inside, and interrupts before one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.count, self._stop = 0, stop
        self._folder = str(CHECKOUT / "mlx_qwen35")

    def __enter__(self) -> "Lines":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, value: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._folder):
            return None
        if event == "line":
            if self.count == self._stop:
                sys.settrace(None)
                raise KeyboardInterrupt
            self.count += 1
        return self._trace


class TestProgress:
    def test_in_a_notebook(self, screen: Any) -> None:
        bar = ProgressBar("Loading")
        for done in (0, 1_000_000, 2_000_000_000):
            bar(done, 2_000_000_000)
        (shown,) = screen
        assert shown[0]["text/html"].startswith('<progress value="0" max="2000000000">')
        assert shown[-1]["text/plain"].startswith("Loading: 2.00 GB of 2.00 GB, ")
        bar(0, 10)
        assert len(screen) == 2

    def test_in_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        bar = ProgressBar("Reading", "tokens")
        for done in (0, 5, 10, 0, 10):
            bar(done, 10)
        err = capsys.readouterr().err
        assert err.count("100%") == 2 and "Reading" in err and "10/10" in err

    def test_of_a_load(self, checkpoint: Any, screen: Any) -> None:
        mlx_qwen35.load(checkpoint, on_progress=ProgressBar("Loading"))
        assert len(screen) == 1 and len(screen[0]) >= 2


@pytest.fixture(autouse=True)
def plain_signals() -> Iterator[None]:
    """Whatever a test does, Ctrl-C is Python's own before and after."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    running, is_rich = shell.running, shell.is_rich
    yield
    shell.running, shell.is_rich = running, is_rich


def test_the_reply_needs_no_chat() -> None:
    assert Reply("hello")._repr_mimebundle_()["text/markdown"] == "hello"


def test_a_chat_is_saved_and_goes_on(tmp_path):
    from mlx_qwen35.session.lock import SessionLock

    file = tmp_path / "kept"
    first = Chat(*load(), system="be", display="off", sampling=Sampling(), max_tokens=4)
    first.send("What is 2 + 3?")
    first.save(file)
    second = Chat(*load(), display="off", sampling=Sampling(), max_tokens=4)
    second.send("Hello!")
    second.load(file)
    assert second.history == first.history and second.last is None and [*tmp_path.iterdir()] == [file]
    again = [chat.send("What is 4 + 4?") for chat in (first, second)]
    assert again[0].text == again[1].text
    with SessionLock(file), pytest.raises(SessionError, match="in use by another program"):
        second.save(file)
