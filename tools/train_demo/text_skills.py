"""Questions in words: sums, word lists, recall, JSON, tools, small talk. Each maker draws one case at random."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from case import Case, Maker, draw
from words import ANIMALS, CITIES, FOODS, JOBS, NAMES, THINGS

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Be brief.", "Answer the question.")


def ask(rng: random.Random, question: str) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.25 else []
    return [*system, {"role": "user", "content": question}]


def maybe(rng: random.Random, thought: str, share: float = 0.4) -> str | None:
    """The thought in `share` of the cases; None (thinking switched off) in the others."""
    return thought if rng.random() < share else None


# Sums ----------------------------------------------------------------------------------------------------------------


def digits(n: int, width: int) -> list[int]:
    """Decimal digits, ones first, padded with zeros."""
    return [n // 10**i % 10 for i in range(width)]


def add_steps(a: int, b: int) -> str:
    steps, carry = [], 0
    width = len(str(max(a, b)))
    for x, y in zip(digits(a, width), digits(b, width), strict=True):
        total = x + y + carry
        steps.append(f"{x}+{y}" + ("+1" if carry else "") + f"={total}")
        carry = total // 10
    return ", ".join(steps)


def subtract_steps(a: int, b: int) -> str:
    steps, borrow = [], 0
    width = len(str(a))
    for x, y in zip(digits(a, width), digits(b, width), strict=True):
        lent = x - y - borrow < 0
        rest = x - y - borrow + 10 * lent
        steps.append(f"{x}-{y}" + ("-1" if borrow else "") + ("+10" if lent else "") + f"={rest}")
        borrow = int(lent)
    return ", ".join(steps)


def multiply_steps(a: int, b: int) -> str:
    """`b` has one digit."""
    steps, carry = [], 0
    for x in digits(a, len(str(a))):
        total = x * b + carry
        steps.append(f"{x}*{b}={x * b}" + (f"+{carry}={total}" if carry else ""))
        carry = total // 10
    return ", ".join(steps)


def arithmetic(rng: random.Random) -> Case:
    operation = rng.choice("++--*")
    size = rng.choice((10, 100, 100, 1000, 1000))
    a, b = rng.randrange(size), rng.randrange(size)
    if operation == "+":
        thought, value = add_steps(a, b), a + b
    elif operation == "-":
        a, b = max(a, b), min(a, b)
        thought, value = subtract_steps(a, b), a - b
    else:
        b = rng.randrange(2, 10)
        thought, value = multiply_steps(a, b), a * b
    sum_ = f"{a} {operation} {b}"
    question = rng.choice((f"What is {sum_}?", f"Compute {sum_}.", f"{sum_} = ?"))
    return Case("arithmetic", ask(rng, question), str(value), thought, key=sum_)


def small_sum(rng: random.Random) -> Case:
    """Sums that are answered without thinking."""
    a, b = rng.randrange(20), rng.randrange(10)
    question = rng.choice((f"What is {a} + {b}?", f"Compute {a} + {b}.", f"{a} + {b} = ?"))
    return Case("small_sum", ask(rng, question), str(a + b), key=f"{a}+{b}")


# Word lists ----------------------------------------------------------------------------------------------------------


def sort_words(rng: random.Random) -> Case:
    words = rng.sample(THINGS, rng.randrange(3, 7))
    listed = ", ".join(words)
    question = rng.choice((f"Sort these words: {listed}", f"Sort by alphabet: {listed}"))
    return Case("sort", ask(rng, question), ", ".join(sorted(words)), maybe(rng, "A to Z."), key=listed)


def reverse_words(rng: random.Random) -> Case:
    words = rng.sample(THINGS, rng.randrange(3, 8))
    listed = ", ".join(words)
    question = rng.choice((f"Reverse these words: {listed}", f"Say it backwards: {listed}"))
    return Case("reverse", ask(rng, question), ", ".join(words[::-1]), maybe(rng, "Last to first."), key=listed)


# Recall --------------------------------------------------------------------------------------------------------------


def code(rng: random.Random) -> str:
    return str(rng.randrange(100, 1000))


FACTS = {  # attribute -> (statement, question, values)
    "city": ("{name} lives in {value}.", "Where does {name} live?", CITIES),
    "food": ("{name} likes {value}.", "What does {name} like?", FOODS),
    "job": ("{name} is a {value}.", "What is the job of {name}?", JOBS),
    "animal": ("{name} has a {value}.", "Which animal does {name} have?", ANIMALS),
    "code": ("The code of {name} is {value}.", "What is the code of {name}?", code),
}


def recall(rng: random.Random) -> Case:
    count = rng.randrange(3, 13) if rng.random() < 0.75 else rng.randrange(13, 61)
    pairs = rng.sample([(name, kind) for name in NAMES for kind in FACTS], count)
    statements, values = [], []
    for name, kind in pairs:
        statement, _, source = FACTS[kind]
        values.append(source(rng) if callable(source) else rng.choice(source))
        statements.append(statement.format(name=name, value=values[-1]))
    text = " ".join(statements)

    def about(fact: int, before: str) -> Case:
        name, kind = pairs[fact]
        question = FACTS[kind][1].format(name=name)
        thought = maybe(rng, statements[fact])
        return Case("recall", ask(rng, before + question), values[fact], thought, key=f"{text}|{question}")

    first, *more = rng.sample(range(count), min(count, 5))
    case = about(first, f"{text}\n")
    case.follow_ups.extend(about(fact, "") for fact in more)
    return case


# JSON ----------------------------------------------------------------------------------------------------------------

KEYS = "name city age code food job tags size open count owner items".split()


def json_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return rng.choice((NAMES, CITIES, FOODS, THINGS)[rng.randrange(4)])
    if kind == 2:
        return rng.randrange(1000)
    if kind == 3:
        return rng.choice((True, False, None))
    if kind == 4:
        return round(rng.uniform(0, 10), 1)
    if kind == 5:
        return {k: json_value(rng, depth - 1) for k in rng.sample(KEYS, rng.randrange(1, 3))}
    return [json_value(rng, 0) for _ in range(rng.randrange(1, 4))]


def copy_json(rng: random.Random) -> Case:
    value = {k: json_value(rng, 1) for k in rng.sample(KEYS, rng.randrange(1, 6))}
    text = json.dumps(value)
    question = rng.choice((f"Copy this JSON: {text}", f"Repeat: {text}"))
    return Case("json", ask(rng, question), text, maybe(rng, "Word for word.", 0.3), key=text)


# Tools ---------------------------------------------------------------------------------------------------------------


def tool(name: str, description: str, /, **properties: str) -> dict[str, Any]:
    typed = {k: {"type": t} for k, t in properties.items()}
    schema = {"type": "object", "properties": typed, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def number(low: int, high: int):
    return lambda rng: rng.randrange(low, high)


TOOLS = {  # name -> (tool, requests, where the arguments come from, what the tool may answer)
    "get_weather": (
        tool("get_weather", "Weather of a city", city="string", days="integer"),
        ("How is the weather in {city} for {days} days?", "Weather in {city}, next {days} days."),
        {"city": CITIES, "days": number(1, 10)},
        ("sunny", "rain", "snow", "windy"),
    ),
    "set_timer": (
        tool("set_timer", "Start a timer", minutes="integer"),
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
        {"minutes": number(1, 100)},
        ("started", "timer is on"),
    ),
    "send_message": (
        tool("send_message", "Send a text", name="string", text="string"),
        ("Tell {name} that the {text} is here.", "Send {name} the word {text}."),
        {"name": NAMES, "text": THINGS},
        ("sent", "not sent"),
    ),
    "buy": (
        tool("buy", "Buy a thing", item="string", count="integer"),
        ("Buy {count} of {item}.", "I need {count} times {item}."),
        {"item": FOODS, "count": number(2, 30)},
        ("bought", "sold out"),
    ),
    "light": (
        tool("light", "Switch a light", room="string", on="boolean"),
        ("Switch the light in the {room}: {on}.", "Light of the {room} to {on}."),
        {"room": ("kitchen", "garden", "hall", "yard"), "on": ("true", "false")},
        ("done", "no light"),
    ),
    "book_trip": (
        tool("book_trip", "Book a trip", start="string", end="string"),
        ("Book a trip from {start} to {end}.", "I want to go from {start} to {end}."),
        {"start": CITIES, "end": CITIES},
        ("booked", "no seats"),
    ),
    "find_person": (
        tool("find_person", "Look up a person", name="string"),
        ("Who is {name}?", "Find {name}."),
        {"name": NAMES},
        ("a " + JOBS[0], "a " + JOBS[4], "not found"),
    ),
}


def offer(rng: random.Random) -> list[str]:
    return rng.sample([*TOOLS], rng.choice((1, 2, 2, 3)))


def wish(rng: random.Random, offered: list[str]) -> tuple[str, str, dict[str, str], str]:
    """(the right tool, the request, the arguments as text, the call as the template writes it)"""
    name = rng.choice(offered)
    _, requests, sources, _ = TOOLS[name]
    arguments = {k: str(s(rng) if callable(s) else rng.choice(s)) for k, s in sources.items()}
    request = rng.choice(requests).format(**arguments)
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    call = f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
    return name, request, arguments, call


def call_tool(rng: random.Random) -> Case:
    offered = offer(rng)
    tools = [TOOLS[name][0] for name in offered]

    def one() -> Case:
        name, request, _, call = wish(rng, offered)
        messages = [{"role": "user", "content": request}]
        return Case("tools", messages, call, maybe(rng, f"I use {name}."), tools, key=request)

    case = one()
    case.follow_ups.extend(one() for _ in range(2))
    return case


def tool_answer(rng: random.Random) -> Case:
    """The turn after the call: say what the tool said."""
    offered = offer(rng)
    name, request, arguments, _ = wish(rng, offered)
    tools = [TOOLS[o][0] for o in offered]
    said = rng.choice(TOOLS[name][3])
    messages = [
        {"role": "user", "content": request},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
        },
        {"role": "tool", "content": said},
    ]
    thought = maybe(rng, "Read the answer.")
    return Case("tool_answer", messages, f"It says: {said}.", thought, tools, key=f"{request}|{said}")


# Small talk ----------------------------------------------------------------------------------------------------------

TALK = (
    (("Hello!", "Hi", "Hello"), "Hello! Ask me a sum, a list to sort, or what is in a picture."),
    (("Who are you?", "What are you?"), "I am a very small demo model of the Qwen3.5 family."),
    (("What can you do?", "Help"), "I can add, sort, reverse, recall, copy JSON, call tools and look at pictures."),
    (("Thanks!", "Thank you."), "You are welcome."),
)


def talk(rng: random.Random) -> Case:
    questions, answer = rng.choice(TALK)
    return Case("talk", ask(rng, rng.choice(questions)), answer, maybe(rng, "Be kind."), key=str(rng.random()))


TEXT_SKILLS: dict[str, Maker] = {  # scored on held-out questions
    "arithmetic": arithmetic,
    "sort": sort_words,
    "reverse": reverse_words,
    "recall": recall,
    "json": copy_json,
    "tools": call_tool,
    "tool_answer": tool_answer,
}
UNSCORED: dict[str, Maker] = {"small_sum": small_sum, "talk": talk}


def with_history(case: Case, rng: random.Random) -> Case:
    """The same question later in a chat: earlier turns before it, their reasoning dropped as the template does."""
    past: list[dict[str, Any]] = []
    for _ in range(rng.randrange(1, 3)):
        maker = rng.choice((arithmetic, sort_words, reverse_words, small_sum, talk, copy_json))
        earlier = draw(maker, rng, held_out=False)
        question = [m for m in earlier.messages if m["role"] == "user"]
        past += [*question, {"role": "assistant", "content": earlier.answer}]
    first = 1 if case.messages[0]["role"] == "system" else 0
    messages = [*case.messages[:first], *past, *case.messages[first:]]
    return replace(case, messages=messages)
