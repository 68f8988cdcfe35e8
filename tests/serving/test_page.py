"""The page, driven in a real browser: conversations with pictures, tools, thinking, stop, edit and reload."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from mlx_qwen35.serving import endpoint
from mlx_qwen35.serving.exchange import Alive
from mlx_qwen35.serving.refusal import Refusal
from tests.serving.browser import Script, answered, browser, opened, say, until
from tests.serving.fake import calls, ends, says, thinks
from tests.serving.running import running

WEATHER = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def url(chromium: Any) -> Iterator[str]:
    with running() as server:
        yield server.url


@pytest.fixture
def page(chromium: Any, url: str) -> Iterator[Any]:
    with opened(chromium, url) as page:
        yield page


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(endpoint, "EngineAnswering", made)
    return made


def png(width: int, height: int, color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def roles(prompt: Any) -> list[str]:
    return [message["role"] for message in prompt]


def test_a_conversation_with_the_demo_outlasts_a_reload(page: Any) -> None:
    say(page, "What is 867 + 821?")
    one = answered(page)
    assert one.locator(".text").inner_text() == "1688"
    assert not one.locator(".thought").get_attribute("open") and "7+1=8" in one.locator(".thought .pre").text_content()
    one.locator("summary").click()
    assert one.locator(".thought .pre").is_visible()
    told = r"[\d.]+ tokens/s · \d+ tokens · \d+ of \d+ prompt tokens cached · first after [\d.]+ s"
    assert re.fullmatch(told, one.locator(".stats").inner_text())
    say(page, "What is 867 + 822?")
    assert not answered(page, 2).locator(".stats").inner_text().split(" · ")[2].startswith("0 of")
    before = page.locator("#messages").text_content()
    page.reload()
    page.wait_for_selector(".answer")
    assert page.locator("#messages").text_content() == before
    assert page.locator("#talks a[aria-current]").inner_text() == "What is 867 + 821?"


def test_the_demo_sees_a_picture(page: Any) -> None:
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": png(64, 64)})
    page.wait_for_selector("#pictures img")
    say(page, "What is in the picture?")
    assert answered(page).locator(".text").inner_text()
    assert page.locator(".you img").get_attribute("src").startswith("data:image/png;base64,")
    assert page.locator("#pictures li").count() == 0
    page.reload()
    assert page.locator(".you img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 64


def test_pictures_come_by_drop_and_paste_and_large_ones_are_made_small(page: Any, script: Script) -> None:
    give = """([name, bytes, kind, type]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
        const made = kind === "drop"
            ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true});
        document.querySelector("#field").dispatchEvent(made);
    }"""
    page.evaluate(give, ["large.png", list(png(4000, 1000)), "drop", "image/png"])
    page.wait_for_selector("#pictures li:nth-child(1)")
    page.evaluate(give, ["small.png", list(png(10, 10)), "paste", "image/png"])
    page.wait_for_selector("#pictures li:nth-child(2)")
    page.evaluate(give, ["words.txt", [65], "drop", "text/plain"])
    assert "Only pictures" in page.locator("#notice").inner_text()
    page.evaluate(give, ["broken.png", [65], "paste", "image/png"])
    page.wait_for_function("() => document.querySelector('#notice').innerText.includes('cannot read')")
    page.get_by_role("button", name="Remove picture 2").click()
    script.says(says("Red."), ends())
    say(page, "What is it?")
    answered(page)
    (message,) = script.asked[0].prompt
    kinds = [getattr(part, "kind", None) or part["type"] for part in message["content"]]
    size = page.locator(".you img").evaluate(
        "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
    )
    assert kinds == ["image", "text"] and size == [1568, 392]


def test_a_tool_call_is_shown_and_goes_on_with_what_the_tool_says(page: Any, script: Script) -> None:
    page.click("#open-settings")
    page.fill("#tools", '[{"name": 3}]')
    assert "Tool 1 has no name" in page.locator("#tools-error").inner_text()
    page.fill("#tools", WEATHER)
    assert page.locator("#tools-error").inner_text() == ""
    page.press("#tools", "Escape")
    script.says(thinks("It wants a place."), calls("weather", {"place": "Oslo", "days": 2}), ends())
    say(page, "Weather?")
    one = answered(page)
    assert "weather" in one.locator(".call h3").inner_text()
    assert one.locator(".call pre").inner_text() == '{\n  "place": "Oslo",\n  "days": 2\n}'
    script.says(says("It rains."), ends())
    one.get_by_role("textbox").fill("rain, 4 degrees")
    one.get_by_role("button", name="Go on").click()
    assert answered(page, 2).locator(".text").inner_text() == "It rains."
    assert script.asked[0].options["tools"][0]["function"]["name"] == "weather"
    assert roles(script.asked[1].prompt) == ["user", "assistant", "tool"]
    assert script.asked[1].prompt[2]["content"] == "rain, 4 degrees"
    assert "rain, 4 degrees" in one.locator(".call pre").nth(1).inner_text()
    page.reload()
    page.wait_for_selector(".answer")
    assert (
        page.locator(".call pre").nth(1).inner_text() == "rain, 4 degrees"
        and not page.locator(".call textarea").count()
    )


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_stopped_and_what_there_is_of_it_stays(page: Any, script: Script, how: str) -> None:
    script.says(*[says(f"word{at} ") for at in range(150)], ends(), pause=0.02)
    page.wait_for_timeout(500)  # while a page is being loaded Chromium may keep the connection of an ended request
    say(page, "Talk")
    page.wait_for_function("() => document.querySelector('.answer .text').innerText.includes('word5')")
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    page.click("#stop") if how == "button" else page.press("#field", "Escape")
    one = answered(page)
    until(lambda: script.played[0].let_go, page)
    assert script.played[0].usage.answer_tokens < 100  # the server stopped too
    assert one.locator(".note").inner_text() == "Stopped" and "word5" in one.locator(".text").inner_text()
    script.says(says("Again."), ends())
    one.get_by_role("button", name="Answer again").click()
    assert answered(page).locator(".text").inner_text() == "Again."
    assert roles(script.asked[1].prompt) == ["user"]


def test_an_edited_message_is_answered_and_what_followed_it_is_gone(page: Any, script: Script) -> None:
    for at in range(3):
        script.says(says(f"answer {at}"), ends())
        say(page, f"question {at}")
        answered(page, at + 1)
    page.locator(".you").nth(1).get_by_role("button", name="Edit").click()
    field = page.locator(".you textarea")
    assert field.input_value() == "question 1"
    field.press("Escape")
    assert page.locator(".you").count() == 3
    page.locator(".you").nth(1).get_by_role("button", name="Edit").click()
    script.says(says("another"), ends())
    field.fill("question x")
    field.press("Enter")
    assert answered(page, 2).locator(".text").inner_text() == "another"
    assert [message["content"] for message in script.asked[-1].prompt] == ["question 0", "answer 0", "question x"]
    page.locator("#field").press("ArrowUp")
    assert page.locator(".you textarea").input_value() == "question x"


def test_settings_are_sent_and_kept(page: Any, script: Script) -> None:
    page.keyboard.press("Alt+p")
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "7",
        "max_tokens": "99",
    }.items():
        page.fill(f"#{name}", value)
    page.select_option("#thinking", "off")
    page.get_by_role("button", name="Done").click()
    page.reload()
    script.says(says("Yes."), ends())
    say(page, "Hello")
    answered(page)
    asked = script.asked[0]
    assert asked.model == "demo" and asked.stream and asked.extra["usage"]
    assert asked.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 7} and asked.options["max_tokens"] == 99
    assert asked.options["enable_thinking"] is False and asked.prompt[0] == {"role": "system", "content": "Be brief."}


def test_several_conversations_are_kept_apart_and_deleted(page: Any, script: Script) -> None:
    for name in ("first", "second"):
        page.click("#new")
        script.says(says(f"about {name}"), ends())
        say(page, name)
        answered(page)
    assert page.locator("#talks a").all_inner_texts() == ["second", "first"]
    script.says(*[says(f"w{at} ") for at in range(40)], ends(), pause=0.02)
    say(page, "more")
    page.locator("#talks a", has_text="first").click()  # the other goes on meanwhile
    page.wait_for_function("() => document.querySelector('#messages').innerText.includes('about first')")
    assert "about second" not in page.locator("#messages").inner_text() and page.locator("#send").is_visible()
    page.locator("#talks a", has_text="second").click()
    assert "w39" in answered(page, 2).locator(".text").inner_text()
    page.get_by_role("button", name="Delete: second").click()
    page.get_by_role("button", name="Keep").click()
    page.get_by_role("button", name="Delete: second").click()
    page.locator("#confirm").get_by_role("button", name="Delete").click()
    page.wait_for_function("() => document.querySelectorAll('#talks a').length === 1")
    assert page.locator(".you").count() == 0 and page.locator("#empty").is_visible()
    page.reload()
    assert page.locator("#talks a").all_inner_texts() == ["first"]


def test_errors_are_told_where_the_answer_would_be(chromium: Any, url: str, script: Script) -> None:
    with opened(chromium, url, quiet=False) as page:  # a browser writes a refused request into its console
        script.says(says("Half an ans"), Refusal("unavailable", "the server is closing: ask again"))
        say(page, "Hello")
        one = answered(page)
        assert one.locator(".note.wrong").inner_text() == "the server is closing: ask again"
        assert one.locator(".text").inner_text() == "Half an ans"
        page.route("**/v1/chat/completions", lambda route: route.abort())
        one.get_by_role("button", name="Answer again").click()
        page.wait_for_function("() => document.querySelector('.note').innerText.includes('is it running?')")
        page.unroute("**/v1/chat/completions")
        broken = {
            "status": 200,
            "content_type": "text/event-stream",
            "body": 'data: {"choices":[{"delta":{"content":"x"}}]}\n\n',
        }
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**broken))
        page.get_by_role("button", name="Answer again").click()
        page.wait_for_function("() => document.querySelector('.note').innerText.includes('before the answer did')")


def test_a_key_is_asked_for_where_the_server_wants_one(chromium: Any) -> None:
    with running(api_key="secret-key") as server, opened(chromium, server.url, quiet=False) as page:
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "secret-key")
        page.get_by_role("button", name="Done").click()
        page.wait_for_function("() => document.querySelector('#model').value === 'demo'")
        say(page, "What is 1 + 1?")
        assert answered(page).locator(".text").inner_text()
        assert page.evaluate("JSON.stringify(localStorage).includes('secret')") is False


def test_a_screen_reader_hears_blocks_and_no_single_words(page: Any, script: Script) -> None:
    words = "One sentence of it.\n\nAnother one, with a list:\n\n- first\n- second\n".replace(" ", " \0").split("\0")
    script.says(Alive(1, 9), *[says(word) for word in words], ends(), pause=0.01)
    page.evaluate("""() => {
        window.heard = [];
        const hear = (each) => each.addedNodes.forEach((node) => heard.push(node.textContent));
        const observer = new MutationObserver((all) => all.forEach(hear));
        observer.observe(document.querySelector("#announcer"), {childList: true});
    }""")
    say(page, "Talk")
    answered(page)
    assert page.evaluate("heard") == ["One sentence of it.", "Another one, with a list:", "firstsecond"]
    assert page.locator("#announcer").get_attribute("aria-live") == "polite"
    assert page.locator("#messages [aria-live]").count() == 0


def test_everything_has_a_name_and_is_reached_by_keyboard(page: Any, script: Script) -> None:
    script.says(thinks("Hm."), says("```python\nx\n```"), ends())
    say(page, "Talk")
    answered(page)
    nameless = """() => [...document.querySelectorAll("button, input, select, textarea, a, img, [role=region]")].filter(
        (each) => !(each.labels?.length || each.getAttribute("aria-label") || each.textContent.trim() || each.alt))
            .map((each) => each.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.locator(".skip").focus()
    found = [page.locator(".skip").inner_text()]
    while found[-1] != "field" and len(found) < 40:
        page.keyboard.press("Tab")
        found.append(
            page.evaluate("() => document.activeElement.id || document.activeElement.innerText.split('\\n')[0]")
        )
    order = [
        "To the message field",
        "new",
        "Talk",
        "model",
        "open-settings",
        "Edit",
        "Thought for a moment",
        "Copy",
        "field",
    ]
    assert [name for name in found if name in order and found.count(name) == 1 or name == "Copy"][:6] == order[:6]
    assert set(order) <= set(found), found
    page.keyboard.press("Control+/")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+n")
    assert page.locator("#empty").is_visible() and page.evaluate("document.activeElement.id") == "field"


def test_a_phone_has_a_drawer_and_nothing_is_wider_than_it(chromium: Any, url: str, script: Script) -> None:
    with opened(chromium, url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as page:
        table = (
            "| a | b |\n|---|---|\n"
            + "| "
            + "x" * 80
            + " | "
            + "y" * 80
            + " |\n\n```\n"
            + "z" * 300
            + "\n```\n\n"
            + "w" * 200
        )
        script.says(thinks("q" * 300), says(table), ends())
        say(page, "Talk" * 60)
        answered(page)
        page.locator("summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#talk").evaluate("place => place.scrollWidth <= place.clientWidth")
        assert not page.locator("#side").is_visible()
        page.click("#open-side")
        assert page.locator("#new").is_visible() and page.locator("#open-side").get_attribute("aria-expanded") == "true"
        page.keyboard.press("Escape")
        page.wait_for_selector("#side", state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart(chromium: Any, url: str, scheme: str) -> None:
    pairs = [("ink", "paper"), ("ink", "side"), ("ink", "raised"), ("ink", "mine"), ("ink", "code"), ("soft", "paper"),
             ("soft", "side"), ("soft", "raised"), ("soft", "code"), ("accent", "paper"), ("accent", "raised"),
             ("on-accent", "accent"), ("wrong", "paper"), ("wrong", "wrong-paper"), ("wrong", "raised")]  # fmt: skip
    with opened(chromium, url, color_scheme=scheme) as page:
        read = "name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()"

        def light(name: str) -> float:
            value = page.evaluate(read, name)
            parts = [int(value[at : at + 2], 16) / 255 for at in (1, 3, 5)]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        for front, back in pairs:
            high, low = sorted((light(front), light(back)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back, scheme)
        for edge in ("edge", "accent", "focus"):
            high, low = sorted((light(edge), light("paper")), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (edge, scheme)


def test_a_browser_that_has_no_room_or_keeps_nothing_says_so(
    page: Any, chromium: Any, url: str, script: Script
) -> None:
    page.evaluate("""() => {
        IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };
    }""")
    script.says(says("Yes."), ends())
    say(page, "Hello")
    assert answered(page).locator(".text").inner_text() == "Yes."
    assert "no room left" in page.locator("#notice").inner_text()
    without = "Object.defineProperty(window, 'indexedDB', {get() { throw new DOMException('no', 'SecurityError'); }})"
    context = chromium.new_context()
    try:
        other = context.new_page()
        other.add_init_script(without)
        other.goto(url)
        other.wait_for_function("() => document.querySelector('#notice').innerText.includes('keeps nothing')")
        script.says(says("Yes."), ends())
        say(other, "Hello")
        assert answered(other).locator(".text").inner_text() == "Yes."
    finally:
        context.close()
