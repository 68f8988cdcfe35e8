"""What to ask the model inside the package, which answers only what it was trained for (docs/DEMO.md).

Knows words. Loads nothing.
"""

DEMO_PROMPT = "What is 17 + 25?"
DEMO_HINT = (
    'Ask the demo what it was trained for, such as "What is 17 + 25?", "Sort these words: queen, jacket, violin", '
    '"Reverse these words: stone, apple, lamp", or what is in a picture of coloured shapes; it knows nothing else.'
)
