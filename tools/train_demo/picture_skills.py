"""Questions about pictures and short videos of coloured shapes, drawn with Pillow. Knows no tokens, no arrays."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

from case import Case, Maker
from PIL import Image, ImageDraw
from words import COLOURS, COLUMNS, ROWS, SHAPES

SIZES = ((64, 64), (64, 96), (96, 64), (96, 96), (96, 128), (128, 96), (128, 128))  # (height, width), multiples of 32

Thing = tuple[str, str]  # (colour, shape)


def draw_shape(canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float) -> None:
    colour, shape = COLOURS[thing[0]], thing[1]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=max(3, round(radius * 0.35)))
    else:  # cross
        arm = radius * 0.35
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def blank(rng: random.Random, height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), tuple(rng.randrange(0, 60) for _ in range(3)))


def things(rng: random.Random, count: int) -> list[Thing]:
    """Different things, no two of the same colour and shape."""
    return rng.sample([(c, s) for c in COLOURS for s in SHAPES], count)


def place(rng: random.Random, image: Image.Image, thing: Thing, row: int, column: int) -> None:
    """Draw a thing into one of the nine fields of the picture, a little off its middle."""
    cell_h, cell_w = image.height / 3, image.width / 3
    radius = min(cell_h, cell_w) * rng.uniform(0.36, 0.46)
    x = (column + 0.5) * cell_w + rng.uniform(-0.05, 0.05) * cell_w
    y = (row + 0.5) * cell_h + rng.uniform(-0.05, 0.05) * cell_h
    draw_shape(ImageDraw.Draw(image), thing, x, y, radius)


def name_of(thing: Thing) -> str:
    return f"{thing[0]} {thing[1]}"


def field_name(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


def worn(case: Case, rng: random.Random) -> Case:
    """The same question, its pictures as lossy files give them back: colours at half size, a little noise."""
    quality = rng.randrange(70, 96)

    def again(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    content = []
    for part in case.messages[-1]["content"]:
        if part["type"] == "image":
            part = {**part, "image": again(part["image"])}
        elif part["type"] == "video":
            part = {**part, "video": [again(frame) for frame in part["video"]]}
        content.append(part)
    return replace(case, messages=[*case.messages[:-1], {**case.messages[-1], "content": content}])


def media(question: str, *items: tuple[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": kind, kind: value} for kind, value in items]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def fields(rng: random.Random, count: int) -> list[tuple[int, int]]:
    return rng.sample([(r, c) for r in range(3) for c in range(3)], count)


def what(rng: random.Random) -> Case:
    """One thing, large."""
    height, width = rng.choice(SIZES)
    image, (thing,) = blank(rng, height, width), things(rng, 1)
    radius = min(height, width) * rng.uniform(0.2, 0.4)
    x = rng.uniform(radius + 2, width - radius - 2)
    y = rng.uniform(radius + 2, height - radius - 2)
    draw_shape(ImageDraw.Draw(image), thing, x, y, radius)
    question = rng.choice(("What is in the picture?", "What do you see?"))
    return Case("what", media(question, ("image", image)), f"a {name_of(thing)}", key=f"{thing}{x:.2f}{y:.2f}")


def seen(shown: list[Thing], spots: list[tuple[int, int]], *, placed: bool) -> str:
    """What is to be thought of a picture: its things line by line, with their fields or without."""
    ordered = sorted(zip(spots, shown, strict=True))
    return ", ".join(name_of(thing) + (f" {field_name(*spot)}" if placed else "") for spot, thing in ordered)


def where(rng: random.Random) -> Case:
    image = blank(rng, *rng.choice(SIZES[3:]))
    shown = things(rng, rng.choice((1, 2, 2, 3)))
    spots = fields(rng, len(shown))
    for thing, spot in zip(shown, spots, strict=True):
        place(rng, image, thing, *spot)
    case, *more = (where_is(image, shown[i:] + shown[:i], spots[i:] + spots[:i]) for i in range(len(shown)))
    case.follow_ups.extend([count_of(image, shown, spots), *more[:1]])
    return case


def where_is(image: Image.Image, shown: list[Thing], spots: list[tuple[int, int]]) -> Case:
    """Where the first of the things is."""
    question = f"Where is the {name_of(shown[0])}?"
    answer = f"{name_of(shown[0])} {field_name(*spots[0])}"
    thought = seen(shown, spots, placed=True)
    return Case("where", media(question, ("image", image)), answer, thought, key=f"{shown}{spots}")


def how_many(rng: random.Random) -> Case:
    image = blank(rng, *rng.choice(SIZES[3:]))
    spots = fields(rng, rng.randrange(1, 6))
    shown = [things(rng, 1)[0] for _ in spots]
    for thing, spot in zip(shown, spots, strict=True):
        place(rng, image, thing, *spot)
    case = count_of(image, shown, spots)
    once = [i for i, thing in enumerate(shown) if shown.count(thing) == 1]
    if once and len(shown) < 4:
        i = rng.choice(once)
        case.follow_ups.append(where_is(image, shown[i:] + shown[:i], spots[i:] + spots[:i]))
    return case


def count_of(image: Image.Image, shown: list[Thing], spots: list[tuple[int, int]]) -> Case:
    messages = media("How many shapes are there?", ("image", image))
    return Case("count", messages, str(len(shown)), key=f"{sorted(zip(spots, shown, strict=True))}")


def differ(rng: random.Random) -> Case:
    """Two pictures alike but for one thing, of another colour and shape in each: which of them has it?"""
    size = rng.choice(SIZES[3:])
    shared, one, other = things(rng, 3)
    while one[0] == other[0] or one[1] == other[1]:
        shared, one, other = things(rng, 3)
    spot, changing = fields(rng, 2)
    background = blank(rng, *size)
    place(rng, background, shared, *spot)
    first, second = background.copy(), background.copy()
    place(rng, first, one, *changing)
    place(rng, second, other, *changing)
    listed = [seen([shared, changed], [spot, changing], placed=False) for changed in (one, other)]
    thought = f"first: {listed[0]}; second: {listed[1]}"

    def which(asked: Thing, answer: str) -> Case:
        question = f"Which picture has a {name_of(asked)}?"
        key = f"{shared}{one}{other}{spot}{changing}{asked}"
        return Case("differ", media(question, ("image", first), ("image", second)), answer, thought, key=key)

    pair = [which(one, "the first"), which(other, "the second")]
    rng.shuffle(pair)
    pair[0].follow_ups.append(pair[1])
    return pair[0]


def two(rng: random.Random) -> Case:
    """Two pictures of one thing each: what `differ` needs, told apart from finding it among others."""
    size, shown = rng.choice(SIZES), things(rng, 2)
    pictures = [blank(rng, *size) for _ in shown]
    for picture, thing in zip(pictures, shown, strict=True):
        place(rng, picture, thing, *fields(rng, 1)[0])

    def about(question: str, answer: str, thought: str | None = None) -> Case:
        key = f"{shown}{question}"
        return Case("two", media(question, *(("image", p) for p in pictures)), answer, thought, key=key)

    asked = []
    thought = f"first: {name_of(shown[0])}; second: {name_of(shown[1])}"
    for number, thing in zip(("first", "second"), shown, strict=True):
        asked.append(about(f"What is in the {number} picture?", f"a {name_of(thing)}"))
        asked.append(about(f"Which picture has a {name_of(thing)}?", f"the {number}", thought))
    rng.shuffle(asked)
    asked[0].follow_ups.extend(asked[1:3])
    return asked[0]


def told(rng: random.Random) -> Case:
    """A list of things as it is thought of a picture, and one of them to be found in it: `where` and `differ` without
    a picture, and with things that are easily taken for each other."""
    (colour, other_colour), (shape, other_shape) = rng.sample([*COLOURS], 2), rng.sample(SHAPES, 2)
    asked, *more = (colour, shape), (colour, other_shape), (other_colour, shape), (other_colour, other_shape)
    if rng.random() < 0.5:
        shown = [asked, *rng.sample(more, rng.choice((1, 2, 2)))]
        spots = fields(rng, len(shown))
        thought, answer = seen(shown, spots, placed=True), f"{name_of(asked)} {field_name(*spots[0])}"
        question = f"Where is the {name_of(asked)}?"
    else:
        shared, one = rng.sample(more, 2)
        pictures = [[shared, asked], [shared, one]]
        rng.shuffle(pictures)
        listed = [", ".join(map(name_of, rng.sample(picture, 2))) for picture in pictures]
        thought = f"first: {listed[0]}; second: {listed[1]}"
        question = f"Which picture has a {name_of(asked)}?"
        answer = "the first" if asked in pictures[0] else "the second"
    return Case("told", media(f"{thought}. {question}"), answer, thought, key=f"{thought}{question}")


DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns) a step


def moves(rng: random.Random) -> Case:
    """One thing crosses the picture while another rests."""
    height, width = rng.choice(((64, 64), (64, 96), (96, 96)))
    count = rng.choice((4, 6, 8))
    mover, rester = things(rng, 2)
    direction = rng.choice([*DIRECTIONS])
    dy, dx = DIRECTIONS[direction]
    radius = min(height, width) * rng.uniform(0.19, 0.215)
    ground = blank(rng, height, width)
    lane = rng.randrange(2)  # the mover keeps to one half, the other thing rests in the other
    near, far = (0.27, 0.75) if lane == 0 else (0.75, 0.25)
    along = rng.uniform(radius, (width if dx else height) - radius)
    if dx:
        draw_shape(ImageDraw.Draw(ground), rester, along, far * height, radius)
    else:
        draw_shape(ImageDraw.Draw(ground), rester, far * width, along, radius)
    extent = width if dx else height
    start, end = radius, extent - radius
    if dx + dy < 0:
        start, end = end, start
    frames = []
    for i in range(count):
        at = start + (end - start) * i / (count - 1)
        frame = ground.copy()
        x, y = (at, near * height) if dx else (near * width, at)
        draw_shape(ImageDraw.Draw(frame), mover, x, y, radius)
        frames.append(frame)

    def about(question: str, answer: str) -> Case:
        key = f"{mover}{rester}{direction}{lane}{count}{height}{width}{question}"
        return Case("video", media(question, ("video", frames)), answer, key=key)

    pair = [
        about("Which way does it move?", direction),
        about("What moves, and which way?", f"the {name_of(mover)} moves {direction}"),
    ]
    rng.shuffle(pair)
    pair[0].follow_ups.append(pair[1])
    return pair[0]


PICTURE_SKILLS: dict[str, Maker] = {  # scored on held-out questions
    "what": what,
    "where": where,
    "count": how_many,
    "differ": differ,
    "video": moves,
}
PICTURE_PRACTICE: dict[str, Maker] = {"two": two, "told": told}
