"""The MTP head against the NumPy reference: whole, in pieces, at the positions of images, guess after guess."""

import mlx.core as mx
import numpy as np
import pytest

from tests.drafted import with_head

TOLERANCE = 2e-3
TOKENS = np.random.RandomState(3).randint(0, 96, 24)


@pytest.fixture(scope="module", params=["dense", "moe"])
def both(request):
    return with_head(request.param)


def logits(model, head, tokens, hidden, positions, caches=None):
    embeddings = model.embed_tokens(mx.array(tokens[None]))
    h = head(embeddings, mx.array(hidden[None].astype(np.float32)), mx.array(positions), caches)
    return np.array(model.head(h)[0]), h


def test_the_head_is_the_reference(both):
    model, head, reference = both
    hidden = reference.hidden(TOKENS)
    np.testing.assert_allclose(np.array(model.hidden(mx.array(TOKENS[None]))[0]), hidden, atol=TOLERANCE)
    wanted = reference.head(reference.guesses(TOKENS[1:], hidden[:-1]))
    positions = np.arange(len(TOKENS) - 1)[None]
    found, _ = logits(model, head, TOKENS[1:], hidden[:-1], positions)
    assert np.abs(found - wanted).max() <= TOLERANCE
    caches, pieces = head.make_caches(), []
    for start, stop in [(0, 9), (9, 10), (10, 23)]:
        part = slice(start, stop)
        pieces.append(logits(model, head, TOKENS[1:][part], hidden[:-1][part], positions[:, part], caches)[0])
    assert np.abs(np.concatenate(pieces) - wanted).max() <= TOLERANCE


def test_at_the_positions_of_an_image(both):
    model, head, reference = both
    rows, columns = np.divmod(np.arange(12), 4)
    axes = [np.r_[0:5, np.full(12, 5), 9:16], np.r_[0:5, 5 + rows, 9:16], np.r_[0:5, 5 + columns, 9:16]]
    positions = np.stack(axes)  # 5 words, an image of 3 x 4, 7 words
    hidden = reference.hidden(TOKENS, positions)
    wanted = reference.head(reference.guesses(TOKENS[1:], hidden[:-1], positions[:, :-1]))
    found, _ = logits(model, head, TOKENS[1:], hidden[:-1], positions[:, None, :-1])
    assert np.abs(found - wanted).max() <= TOLERANCE
    elsewhere = reference.head(reference.guesses(TOKENS[1:], hidden[:-1]))
    assert np.abs(found - elsewhere).max() > 10 * TOLERANCE, "this prompt cannot tell positions apart"


def test_a_guess_after_a_guess(both):
    """The head's own hidden state takes the place of the model's."""
    model, head, reference = both
    hidden = reference.hidden(TOKENS)[:-1]
    said = TOKENS[1:]
    caches = head.make_caches()
    found, h = logits(model, head, said, hidden, np.arange(len(said))[None], caches)
    for _ in range(3):
        guess = int(found[-1].argmax())
        hidden = np.concatenate([hidden, reference.guesses(said, hidden)[-1:]])
        said = np.append(said, guess)
        wanted = reference.head(reference.guesses(said, hidden))[-1]
        position = mx.array([[len(said) - 1]])
        h = head(model.embed_tokens(mx.array([[guess]])), h[:, -1:], position, caches)
        found = np.array(model.head(h)[0])
        assert np.abs(found[-1] - wanted).max() <= TOLERANCE
