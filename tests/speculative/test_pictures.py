"""Drafts after pictures and videos: the same answers, and a head that stands where the model stands."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.generation import stream_generate
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from tests.drafted import always, random_head
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.talkers import Endless

LAYERS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
IMAGE, FILM = some_media("image", 4, 6, seed=1), some_media("video", 2, 4, 6, seed=3)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_the_same_tokens_from_the_same_positions(monkeypatch, chunk_size):
    always(monkeypatch, 2)
    model, _ = seeing_model(**LAYERS)
    head = random_head(MTPHead(model.config.text))
    tokens, media = prompt_of(3, IMAGE, 2, FILM, 3)
    prompt = Prompt(tokens, None, False, tuple(media))
    options = {"sampling": Sampling(), "max_tokens": 10, "chunk_size": chunk_size}
    plain = [part.token for part in stream_generate(model, Endless(), prompt, **options)]
    cache = model.make_cache()
    parts = [
        part.token for part in stream_generate(model, Endless(), prompt, cache=cache, draft_model=head, **options)
    ]
    assert parts == plain
    drafter = cache.draft
    drafter._take_in()
    said = mx.array([[*tokens, *plain]])
    sight = model.see(said, media)
    assert not np.array_equal(np.array(sight.positions[1]), np.array(sight.positions[0]))
    whole, held = head.make_caches(), said.shape[1] - 1
    embeddings = model.embed_tokens(said[:, 1:])
    head(embeddings, model.hidden(said, None, sight)[:, :-1], sight.positions[..., :-1], whole)
    assert drafter._held == held
    np.testing.assert_allclose(
        np.array(drafter._caches[0].keys)[:, :, :held], np.array(whole[0].keys)[:, :, :held], atol=1e-3
    )
