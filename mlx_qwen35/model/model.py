"""The model: embedding, layers, norm, head, and a vision tower where the checkpoint has one.

Knows how the layers are joined, what a call needs to know about positions and padding, and where features enter.
Knows no files, no strings and no sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.cache import Cache, DeltaState, KVCache, StretchedKVCache
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.cache.listed import CacheList
from mlx_qwen35.cache.ragged import RaggedCache
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import PromptError, Qwen35Error
from mlx_qwen35.experts.chances import Chances
from mlx_qwen35.kernels.lanes import on_cores_worth_waking
from mlx_qwen35.layers.around import Around
from mlx_qwen35.layers.embedding import Embedding
from mlx_qwen35.layers.linear import Linear
from mlx_qwen35.layers.norm import RMSNorm
from mlx_qwen35.layers.rope import RotaryEmbedding
from mlx_qwen35.layers.taps import Taps
from mlx_qwen35.layers.tiles import mix_in_tiles
from mlx_qwen35.vision.positions import Placement, place
from mlx_qwen35.vision.sight import Sight
from mlx_qwen35.vision.tower import VisionTower

from . import windows
from .decoder import DecoderLayer, together
from .pasts import Pasts

if TYPE_CHECKING:
    from mlx_qwen35.experts.pool import ExpertPool, ExpertStats
    from mlx_qwen35.experts.streamed import StreamedExperts
    from mlx_qwen35.vision.media import Media

    from .mtp import MTPHead

PREFILL_CHUNK = 2048
SNAPSHOT_BYTES = 1 << 30  # what a session may take for going back: 5 states of the largest model, 55 of the smallest


AnyMedia = "Sequence[Media] | Sequence[Sequence[Media]]"


class Model(nn.Module):
    """A Qwen3.5 model. Computes in the dtype of its weights; softmax and delta states are float32.

    `media` of its calls: the images and videos whose placeholders are among the tokens, in the order of the prompt; for
    a batch, one such list a row. A prompt that is computed in parts is looked at whole with `see`, and each part gets
    its own, cut anywhere: `sight = model.see(tokens, media)`, then `model(tokens[:, a:b], cache, sight[a:b])`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        text = config.text
        self.config = config
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, kind) for kind in text.layer_types]
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        if not text.tie_word_embeddings:
            self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.vision is not None:
            self.vision = VisionTower(config.vision)
        self._rope = RotaryEmbedding(text.rope)
        self._pool: ExpertPool | None = None
        self.kv_form: KVFormat | None = None  # how caches keep keys and values; None: as they are
        self.snapshot_bytes = SNAPSHOT_BYTES
        self.exact = False  # whether be_exact() was called
        self.kernels = True  # whether kernels of ours are wanted on a GPU
        self._mtp: tuple[MTPHead, ...] = ()  # no list: what tools do to a module's parts must not happen to a head

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prompt that are best given to one call."""
        return PREFILL_CHUNK if self._pool is None else self._pool.plan.chunk

    @property
    def tile(self) -> float:
        """Tokens that one mixer takes at once, at the most."""
        return math.inf if self._pool is None else self._pool.plan.tile

    @property
    def together_chunk(self) -> int:
        """Tokens of several prompts that one call may have; 0: it is to have one prompt's, whose bits then hang on no
        other."""
        if self.exact:
            return 0
        return PREFILL_CHUNK if self._pool is None else min(self._pool.plan.chunk, self._pool.plan.tile)

    def computing(self, tokens: int) -> AbstractContextManager[None]:
        """Inside, a call with so many tokens is made and evaluated, by as many of a CPU's cores as are worth it."""
        return on_cores_worth_waking(tokens * self.config.text.hidden_size**2)

    @property
    def expert_stats(self) -> ExpertStats | None:
        """What streaming experts did since loading; None if they all are in memory."""
        return None if self._pool is None else self._pool.stats()

    _in_windows = True  # whether a few tokens may go through several layers before it is known where their experts are
    ranks_told: Mapping[str, str] | None = None  # how other ranks have parts of this model (plan), and of which one
    pasts = Pasts()  # what those ranks hold of caches

    @property
    def mtp(self) -> MTPHead | None:
        """The head that drafts for this model, where it was loaded; no part of the model's parameters."""
        return self._mtp[0] if self._mtp else None

    def take_mtp(self, head: MTPHead) -> None:
        """Keep a head beside the model."""
        self._mtp = (head,)

    def be_exact(self) -> None:
        """From now on up to 8 rows of a call have the bits that each has alone, and streamed experts give those of
        resident ones, on a GPU too; docs/EXACTNESS.md has what that means and costs. After loading; for good."""
        banks = [] if self._pool is None else self._pool.banks
        for part in (*self.modules(), *banks):
            if part is not self and hasattr(part, "be_exact"):
                part.be_exact()
        self.exact = True

    @property
    def model_type(self) -> str:
        """As config.json calls it; mlx-lm's tools look for it here."""
        return self.config.raw["model_type"]

    def __call__(
        self, tokens: mx.array, cache: Cache | list[Any] | None = None, media: Sight | AnyMedia | None = None
    ) -> mx.array:
        """tokens [B, T] int -> logits [B, T, vocab]; with a cache the tokens follow those it has seen.

        cache: from `make_cache`, or a list of mlx-lm's caches, one a layer, which knows no media.
        """
        return self.head(self.hidden(tokens, cache, media))

    def hidden(
        self,
        tokens: mx.array,
        cache: Cache | RowsCache | RaggedCache | list[Any] | None = None,
        media: Sight | AnyMedia | None = None,
        *,
        more: bool = False,
        between: Callable[[mx.array], None] | None = None,
        wanted: int | None = None,
        taps: Taps | None = None,
    ) -> mx.array:
        """tokens [B, T] int -> hidden states after the final norm [B, T, H].

        cache: as in a call, or a RowsCache, whose rows take one token each [B, 1], or a RaggedCache, whose rows take
        a piece each, one behind the other in [1, T] of at most `together_chunk` tokens, without media.
        more: further tokens of the same prompt follow; streamed experts then keep their memory for the end of it.
        between: called with what came out of each layer, [B, T, H], before the next; what it raises is raised.
        wanted: only so many of the last positions are of use, and returned [B, wanted, H].
        taps: takes what came out of some layers, at all T positions.
        """
        cache = CacheList(cache) if isinstance(cache, list) else cache
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [batch, length] with at least one token, not {list(tokens.shape)}")
        sight = None
        if media:
            sight = media if isinstance(media, Sight) else self.see(tokens, media, cache)
            if sight.shape != tokens.shape:
                raise ValueError(f"media were placed in {list(sight.shape)} tokens, these are {list(tokens.shape)}")
        length = tokens.shape[1]
        readable, present = (None, None) if cache is None else cache.masks(length)
        if sight is not None:
            positions = sight.positions
        else:
            positions = mx.arange(length)[None] if cache is None else cache.positions(length)
        around = Around(self._rope(positions), readable, present)
        # An embedding in one of the mx modes comes out in bfloat16, whatever the model computes in.
        x = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        if sight is not None:
            x = sight.written_into(x)
        x, added = self._through_layers(x, around, cache, more, between, taps)
        if wanted is not None:
            x, added = x[:, -wanted:], None if added is None else added[:, -wanted:]
        if cache is not None:
            cache.advance(length)
            if sight is not None:
                cache.rope_delta = _deltas(cache, sight.next_positions)
        return self.norm.after(x, added)[1]

    def _through_layers(
        self,
        x: mx.array,
        around: Around,
        cache: Cache | CacheList | RowsCache | RaggedCache | None,
        more: bool,
        between: Callable[[mx.array], None] | None,
        taps: Taps | None,
    ) -> tuple[mx.array, mx.array | None]:
        """Arguments as in DecoderLayer, but the cache of all layers, and as in `hidden`; -> two parts of a sum."""
        pool, length, tile = self._pool, x.shape[1], self.tile
        if cache is None and length > tile:
            cache = self.make_cache(x.shape[0])  # which joins the tiles
        states = cache.layers if cache is not None else [None] * len(self.layers)

        def through() -> tuple[mx.array, mx.array | None]:
            last, added = x, None
            for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
                if length > tile:
                    mixed = mix_in_tiles(layer.mix, tile, together(last, added), around, state)
                    last, added = layer.feed(mixed)
                else:
                    last, added = layer(last, around, state, added)
                if between is not None:
                    last, added = together(last, added), None
                    between(last)
                if taps is not None:
                    taps.met(number, last, added)
            return last, added

        if pool is None:
            return through()
        in_windows = self._in_windows and between is None and windows.suit(states, x.size // x.shape[-1])
        with pool.one_at_a_time, pool.turn(more):
            if in_windows:
                return windows.through(self.layers, states, pool, x, around, taps)
            return through()

    def see(
        self,
        tokens: mx.array,
        media: AnyMedia,
        cache: Cache | None = None,
        *,
        known: MutableMapping[str, mx.array] | None = None,
        covered: int = 0,
    ) -> Sight:
        """Place media among tokens [B, T] that follow those of the cache, and encode them.

        covered: the tokens are the whole prompt instead, with all its media, and the cache holds the first `covered` of
        them: the Sight is that of tokens[:, covered:], and only media that reach beyond the cut are encoded. It may lie
        inside of one.
        known: features by Media.key: what is there is not encoded again, what was not is added.
        Raises as `placement`, before anything is encoded.
        """
        rows = _rows_of(media, len(tokens))
        placed = self.placement(tokens, rows, cache, covered=covered)[covered:]
        merge = self._tower().config.spatial_merge_size
        needed: list[list[tuple[int, Media]]] = []  # of each row: number of the first feature, medium
        for shown, taken in zip(rows, placed.features, strict=True):
            firsts = np.cumsum([0, *(math.prod(medium.grid) // merge**2 for medium in shown)]).tolist()
            spans = zip(firsts, firsts[1:], shown, strict=False)
            needed.append([(a, medium) for a, b, medium in spans if np.any((taken >= a) & (taken < b))])
        features = iter(self.encode_media([medium for row in needed for _, medium in row], known=known))
        return Sight(placed, [[(first, next(features)) for first, _ in row] for row in needed])

    def placement(
        self, tokens: mx.array, media: AnyMedia, cache: Cache | None = None, *, covered: int = 0
    ) -> Placement:
        """Where each of tokens [B, T] stands and which feature it takes; computes nothing on the device.

        cache, covered: as in `see`, but all T tokens are placed.
        Raises PromptError if the model has no vision tower or the placeholders among the tokens are not exactly those
        of the media, and ValueError if the cache does not hold the first `covered` tokens.
        """
        ids = np.array(tokens)
        if ids.ndim != 2:
            raise ValueError(f"tokens must be [batch, length], not {list(ids.shape)}")
        rows = _rows_of(media, len(ids))
        vision = self._tower().config
        starts, padding = _begin(None if covered else cache, len(rows))
        if covered and cache is not None and cache.left_padding is not None:
            padding = cache.left_padding.tolist()
        placed = []
        for row, shown, start, pad in zip(ids, rows, starts, padding, strict=True):
            pad = min(pad, len(row))
            placement = place(
                row[pad:],
                shown,
                image_token_id=self.config.image_token_id,
                video_token_id=self.config.video_token_id,
                merge=vision.spatial_merge_size,
                start=start,
            )
            placed.append(placement.padded(pad))
        together = Placement(
            np.concatenate([p.positions for p in placed], axis=1), np.concatenate([p.features for p in placed])
        )
        if covered:
            _check_covered(cache, covered, together)
        return together

    def encode_media(
        self, media: Sequence[Media], *, known: MutableMapping[str, mx.array] | None = None
    ) -> list[mx.array]:
        """The features of each image or video, [placeholders, H], computed; one that comes twice is encoded once."""
        if known is None:  # the key is a hash of all pixels: here the same object is enough
            keys, found = [str(id(medium)) for medium in media], {}
        else:
            keys = [medium.key for medium in media]
            found = {key: known[key] for key in dict.fromkeys(keys) if key in known}
        new = {key: medium for key, medium in zip(keys, media, strict=True) if key not in found}
        tower = self._tower()
        if new:
            encoded = tower.encode([m.rows for m in new.values()], [m.grid for m in new.values()])
            added = dict(zip(new, encoded, strict=True))
            found.update(added)
            if known is not None:
                known.update(added)  # which need not keep them
        return [found[key] for key in keys]

    def _tower(self) -> VisionTower:
        if self.config.vision is None:
            raise PromptError(
                "this checkpoint has no vision weights, so it cannot look at images or videos: give it text only, or "
                "load one that has them"
            )
        return self.vision

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states [.., H] -> logits [.., vocab]."""
        if self.config.text.tie_word_embeddings:
            return self.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def make_cache(self, batch: int = 1, left_padding: Sequence[int] | None = None) -> Cache:
        """An empty cache for `batch` sequences; left_padding[b]: padding tokens at the start of row b."""
        if left_padding is not None and (len(left_padding) != batch or min(left_padding, default=0) < 0):
            raise ValueError(f"left_padding must give a count >= 0 for each of {batch} rows, not {left_padding}")
        kinds = self.config.text.layer_types

        def keys() -> KVCache | StretchedKVCache:
            return KVCache() if self.kv_form is None else StretchedKVCache(self.kv_form)

        layers = [keys() if kind == "full_attention" else DeltaState() for kind in kinds]
        return Cache(layers, left_padding=left_padding)

    def stream_experts(self, pool: ExpertPool, banks: Mapping[int, StreamedExperts]) -> None:
        """Take the experts of some layers, by number, from the disk. After the weights of all others are loaded."""
        for number, bank in sorted(banks.items()):
            self.layers[number].mlp.experts = bank
        for number, bank in banks.items():
            if number + 1 in banks:
                bank.follow(banks[number + 1], _Guess(self.layers[number], self.layers[number + 1]))
        pool.banks = [banks[number] for number in sorted(banks)]
        pool.chances = Chances(banks)
        self._pool = pool

    def join(self) -> None:
        """Put weights that meet the same input side by side in memory, layer by layer, where they are quantized alike.

        After loading. Names and values stay what they are.
        """
        for layer in self.layers:
            layer.join()
            mx.eval(layer.parameters())

    def unload(self) -> None:
        """Give the memory of the weights back. The config stays; any other use is an UnloadedError from now on."""
        if self._pool is not None:
            self._pool.close()
        self.clear()
        self.__class__ = UnloadedModel
        mx.clear_cache()


class _Guess:
    """What the next layer's router would say of the residual stream of this one: it changes little from layer to layer.

    Called with rows as this layer's norm gives them, [N, H]; -> expert ids [N, K].
    """

    def __init__(self, layer: DecoderLayer, following: DecoderLayer):
        own, other = layer.post_attention_layernorm.weight, following.post_attention_layernorm.weight
        # x / rms * own is at hand, x / rms * other is wanted. Where own is 0 nothing is known of x.
        self._ratio = mx.where(own == 0, mx.zeros_like(own), other / mx.where(own == 0, mx.ones_like(own), own))
        self._router = following.mlp
        mx.eval(self._ratio)

    def __call__(self, rows: mx.array) -> mx.array:
        return self._router.choose(rows * self._ratio)[0]


class UnloadedError(Qwen35Error, AttributeError):
    """A model was used after `unload`."""


class UnloadedModel(Model):
    """What is left of a model. A class of its own, so that no call of a loaded one has to ask."""

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise UnloadedError("this model was unloaded and its weights are gone: load it again")

    __call__ = hidden = see = placement = encode_media = head = make_cache = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    def unload(self) -> None:
        """Nothing is left to give back."""


def _begin(cache: Cache | None, batch: int) -> tuple[list[int], list[int]]:
    """Of each row: the position of the next token that is no padding, and how much padding is still to come."""
    if cache is None:
        return [0] * batch, [0] * batch
    deltas = [cache.rope_delta] * batch if isinstance(cache.rope_delta, int) else cache.rope_delta
    padding = [0] * batch if cache.left_padding is None else cache.left_padding.tolist()
    return (
        [max(cache.offset - pad, 0) + delta for pad, delta in zip(padding, deltas, strict=True)],
        [max(pad - cache.offset, 0) for pad in padding],
    )


def _check_covered(cache: Cache | None, covered: int, placed: Placement) -> None:
    """Whether a cache may hold the first `covered` of these tokens: so many, and with media of the same extent."""
    held = 0 if cache is None else cache.offset
    if not 0 < covered == held <= placed.features.shape[1]:
        raise ValueError(
            f"covered is {covered}, but the cache holds {held} tokens of a prompt of {placed.features.shape[1]}: "
            "give the whole prompt, and how much of it the cache holds"
        )
    if _begin(cache, placed.features.shape[0])[0] != placed.positions[0, :, covered].tolist():
        raise ValueError(
            f"the {covered} tokens in the cache stand at other positions than the first of this prompt: their images "
            "are others; begin with a new cache"
        )


def _deltas(cache: Cache, positions: Sequence[int]) -> int | list[int]:
    """The rope_delta of a cache whose rows go on at `positions`."""
    padding = [0] * len(positions) if cache.left_padding is None else cache.left_padding.tolist()
    deltas = [at - max(cache.offset - pad, 0) for at, pad in zip(positions, padding, strict=True)]
    return deltas[0] if len(set(deltas)) == 1 else deltas


def _rows_of(media: AnyMedia, batch: int) -> list[Sequence[Media]]:
    """Media as one list a row."""
    rows = list(media) if media and isinstance(media[0], Sequence) else [media]
    if len(rows) != batch:
        raise ValueError(f"media are given for {len(rows)} rows, but there are {batch}: give one list a row")
    return rows
