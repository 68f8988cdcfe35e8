"""The page in Debian's Chromium, against the real server: with the demo, or with a model that plays what a test says.

Knows Playwright. Without it, or without Chromium, tests that ask for a browser are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_qwen35.serving.exchange import Ask
from mlx_qwen35.serving.pool import Pool
from tests.serving.fake import Fake

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 15_000  # ms that anything may take


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, as Playwright has it."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip(f"there is no {' or '.join(NAMES)}: apt-get install chromium")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"], env=environment
        )
        try:
            yield made
        finally:
            made.close()


@contextmanager
def opened(browser: Any, url: str, *, quiet: bool = True, **context: Any) -> Iterator[Any]:
    """The page in a browser that remembers nothing. quiet: errors and words in its console fail the test, as do
    requests to any other place."""
    made = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | context))
    page = made.new_page()
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda each: None if each.url.startswith((url, "data:", "blob:")) else wrong.append(each.url))
    try:
        page.goto(f"{url}/")
        yield page
        assert not (quiet and wrong), wrong
    finally:
        made.close()


class Scripted(Fake):
    """A Fake in the place of an answer of the engine. let_go: whether the server is done with it."""

    ended = ""
    answering = True
    let_go = False

    async def started(self, within: float | None = None) -> bool:
        return True

    def close(self) -> None:
        self.let_go = True


class Script:
    """Answers in turn, in place of a model: each what `says` next is a list of Parts. asked: what was."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.played: list[Scripted] = []
        self._next: list[tuple[Sequence[Any], float]] = []

    def says(self, *items: Any, pause: float = 0.0) -> None:
        """Parts, Alives or an error of the next answer that has none yet; pause: seconds before each."""
        self._next.append((items, pause))

    async def of(self, pool: Pool, ask: Ask) -> Scripted:
        self.asked.append(ask)
        items, pause = self._next.pop(0)
        self.played.append(Scripted(items, pause=pause))
        self.played[-1].id = f"{len(self.played):024x}"
        return self.played[-1]


def say(page: Any, text: str) -> None:
    """Writes a message and sends it."""
    page.fill("#field", text)
    page.press("#field", "Enter")


def answered(page: Any, count: int = 1) -> Any:
    """The last of so many answers, once it has ended."""
    page.wait_for_function(
        "n => document.querySelectorAll('.answer[aria-busy=false]').length === n && "
        "document.querySelector('#stop').hidden",
        arg=count,
    )
    return page.locator(".answer").nth(count - 1)


def until(holds: Callable[[], bool], page: Any) -> None:
    """Waits for something outside the page."""
    for _ in range(PATIENCE // 20):
        if holds():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not come about")
