"""A chat of 20 turns with thinking, tool calls and pictures, as the demo checkpoint can follow it.

Knows messages and Pillow pictures. Knows no model: whoever plays it says what is answered. tests/session plays it on
our sessions, benchmarks/sessions.py on those of others too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image, ImageDraw

Message = dict[str, Any]
SYSTEM = "You are a helpful assistant."
TURNS = 20


def _tool(name: str, description: str, **types: str) -> dict[str, Any]:
    typed = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": typed, "required": [*types]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool("get_weather", "Weather of a city", city="string", days="integer"),
    _tool("set_timer", "Start a timer", minutes="integer"),
]
RESULTS = {"get_weather": "sunny", "set_timer": "started"}

_SHAPES = ("circle", "square", "triangle", "cross")
_COLOURS = {"red": (225, 35, 35), "green": (30, 190, 60), "blue": (50, 80, 245), "white": (250, 250, 250)}


def picture(number: int) -> Image.Image:
    """Always the same for a number; numbers 0 to 3 are of one size."""
    width, height = (96, 64) if number < 4 else (64 + 32 * (number % 3), 128)
    image = Image.new("RGB", (width, height), (number * 7 % 60, 20, 40))
    canvas, (x, y), colour = ImageDraw.Draw(image), (width // 2, height // 2), [*_COLOURS.values()][number % 4]
    box = (x - 20, y - 20, x + 20, y + 20)
    shape = _SHAPES[number // 2 % 4]
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x, y - 20), (x - 20, y + 20), (x + 20, y + 20)], fill=colour)
    else:
        canvas.rectangle((x - 20, y - 7, x + 20, y + 7), fill=colour)
        canvas.rectangle((x - 7, y - 20, x + 7, y + 20), fill=colour)
    return image


def questions() -> Iterator[Message]:
    """What the user says, turn by turn: sums, tools and pictures in turn, some with two pictures."""
    for turn in range(TURNS):
        kind = turn % 5
        if kind in (0, 3):
            yield _said(f"What is {17 + turn} + {25 + 3 * turn}?")
        elif kind == 1:
            yield _said(f"How is the weather in {('Rome', 'Oslo', 'Paris', 'Lima')[turn // 5]} for {turn + 1} days?")
        elif kind == 2:
            yield _said("What is in the picture?", picture(turn // 5))
        else:
            yield _said("How many shapes are there?", picture(turn), picture(turn + 1))


def play(answer: Callable[[list[Message]], Message]) -> list[list[Message]]:
    """Plays it. answer: all messages, without the system's -> the assistant's message; tool calls in it are given their
    results and asked about once more. Returns the messages of every call of `answer`."""
    messages: list[Message] = []
    asked = []
    for question in questions():
        messages = [*messages, question]
        for _ in range(3):  # calls of tools that follow one another
            asked.append(messages)
            said = answer(messages)
            messages = [*messages, said]
            calls = said.get("tool_calls", ())
            if not calls:
                break
            messages += [{"role": "tool", "content": RESULTS.get(c["function"]["name"], "done")} for c in calls]
    return asked


def _said(text: str, *pictures: Image.Image) -> Message:
    if not pictures:
        return {"role": "user", "content": text}
    shown = [{"type": "image", "image": image} for image in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
