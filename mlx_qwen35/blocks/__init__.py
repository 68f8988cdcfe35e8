"""Block drafters: small models that guess several tokens in one pass, by what some layers of their target say.

    config.py   what a drafter's config.json says, and whether it is for a target
    window.py   keys and values of the context, as far as a layer looks back
    drafter.py  the module: DFlash and DFlash2

Knows geometry and arrays. Knows neither files nor what becomes of the guesses (checkpoint/blocks.py,
speculative/blocks.py). The embedding and the head are the target's.
"""
