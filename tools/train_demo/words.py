"""The small world that the demo checkpoint talks about. Word lists and nothing else."""

from __future__ import annotations

NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kim Lea Mira Noah Olga Paul Rosa Sam Tina Uma Vera Will Yara Zoe "
    "Alan Bea Carl Dora Emil Fay"
).split()
CITIES = (
    "Rome Oslo Paris Lima Cairo Delhi Tokyo Quito Bern Riga Porto Milan Kyoto Dakar Perth Turin Malmo Accra Leeds Tunis"
).split()
FOODS = "rice bread soup cake corn figs plums pears nuts cheese beans pasta honey eggs fish salad".split()
JOBS = "baker doctor pilot farmer singer lawyer painter nurse driver writer judge miner".split()
ANIMALS = "cat dog horse goat bird snake rabbit mouse frog sheep duck owl".split()
THINGS = (
    "apple book chair door engine flag glass hammer ice jacket key lamp map nail oven pen queen rope stone table "
    "vase wheel yard zebra anchor boat cloud drum fence garden hill island jar knife leaf moon needle orange pillow "
    "river sand tower umbrella violin window"
).split()
COLOURS = {
    "red": (225, 35, 35),
    "green": (30, 190, 60),
    "blue": (50, 80, 245),
    "yellow": (240, 220, 40),
    "pink": (245, 120, 200),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
