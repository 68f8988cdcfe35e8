"""How much is drawn: a part in every run, all of it in `make soak`.

Knows the profiles of conftest.py. Knows no test.
"""

import hypothesis


def examples(number: int, part: int = 4, least: int = 10) -> int:
    """How many a test draws that draws `number` in `make soak`: one of `part`, and `least` at the least."""
    return number if hypothesis.settings.get_current_profile_name() == "soak" else max(number // part, least)
