"""Text to token ids and back, whole or token by token, by the tokenizer.json of a checkpoint.

Knows the byte-level BPE of the family and its added tokens. Knows nothing of chats, templates or the model.
"""

from __future__ import annotations

import codecs
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.text.files import File, MadeFolder, as_folder, parse_json_object, read_json_object, read_text

if TYPE_CHECKING:
    import tokenizers

TURN_END = "<|im_end|>"
_LONG = 256  # characters of a stretch between control tokens whose ids are worth keeping
_KEPT = 4_000_000  # characters whose ids are kept at the most
_PROBE = "Hello, it's 12 o'clock:\n\n\tdéjà 日本 😀  ok"


class Tokenizer:
    """The tokenizer of one checkpoint; immutable. Made by `Tokenizer.from_folder`.

    control_tokens: the added tokens, which are one id each in a text that spells them, and their ids; control_pattern:
    finds them in a text, as the group "token"."""

    def __init__(self, rust: tokenizers.Tokenizer, *, eos_token_ids: frozenset[int], vocab_size: int):
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size
        self._rust = rust
        added = rust.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        self.control_tokens = {token.content: i for i, token in added.items()}
        self.control_pattern = _pattern(added.values())
        # Whether a text may be cut at control tokens: then none takes white space with it, or is looked for in words.
        self._cuts = not any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added.values())
        self._kept: OrderedDict[str, array[int]] = OrderedDict()  # ids of stretches, those used last at the end
        self._kept_characters = 0
        self._keeping = threading.Lock()
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path | MadeFolder) -> Tokenizer:
        """Reads tokenizer.json, and from tokenizer_config.json (if it is there) the eos token and the added tokens
        that tokenizer.json lacks. Raises CheckpointError if a file is missing or damaged, if the two disagree about
        an id, or if the tokenizer is not the byte-level BPE of this family."""
        path = as_folder(folder) / "tokenizer.json"
        text = read_text(path)
        declared = parse_json_object(text, path)
        rust = _build(text, path)
        _check_declared_ids(rust, declared, path)
        config_path = path.with_name("tokenizer_config.json")
        config = read_json_object(config_path, optional=True)
        _add_tokens(rust, config, config_path)
        _check_byte_level(rust, declared, path)
        eos_token_ids = _eos_ids(rust, config, config_path)
        tokenizer = cls(rust, eos_token_ids=eos_token_ids, vocab_size=_vocab_size(rust, path))
        if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
            raise CheckpointError(f"{path} does not give a text back as it was; download it again")
        return tokenizer

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """The ids of `text`; added tokens written out in it ("<|im_start|>") become their one id, or, with `plain`,
        the ids of their characters. Nothing is put before or after. Raises PromptError for text that is not Unicode
        (a lone surrogate)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the text holds a lone surrogate at character {error.start}; remove it") from None
        encode = self._plain_ids if plain else self._ids_of_stretches if self._cuts else self._ids
        return _guard(lambda: encode(text), "tokenizer.json")

    def _ids(self, text: str) -> list[int]:
        return self._rust.encode(text, add_special_tokens=False).ids

    def _ids_of_stretches(self, text: str) -> list[int]:
        """What lies between two control tokens is encoded once: a conversation comes again with every turn, and nothing
        in it has other ids for what follows."""
        if len(text) < _LONG:
            return self._ids(text)
        ids: list[int] = []
        start = at = 0  # what was encoded, and what was looked at
        for match in self.control_pattern.finditer(text):
            if match.start() - at >= _LONG:
                ids += self._ids(text[start:at]) if start < at else ()
                ids += self._kept_ids(text[at : match.start()])
                start = match.start()
            at = match.end()
        if len(text) - at >= _LONG:
            ids += self._ids(text[start:at]) if start < at else ()
            return ids + self._kept_ids(text[at:]).tolist()
        return ids + self._ids(text[start:])

    def _kept_ids(self, stretch: str) -> array[int]:
        with self._keeping:
            ids = self._kept.get(stretch)
            if ids is not None:
                self._kept.move_to_end(stretch)
                return ids
        ids = array("I", self._ids(stretch))
        with self._keeping:
            if stretch not in self._kept:
                self._kept[stretch] = ids
                self._kept_characters += len(stretch)
            while self._kept_characters > _KEPT:
                old, _ = self._kept.popitem(last=False)
                self._kept_characters -= len(old)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """The steps of the Rust library behind the one that looks for added tokens."""
        normalizer, tokenize = self._rust.normalizer, self._rust.model.tokenize
        composed = text if normalizer is None else normalizer.normalize_str(text)
        pieces = self._rust.pre_tokenizer.pre_tokenize_str(composed)
        return [token.id for piece, _ in pieces for token in tokenize(piece)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids without a token are left out."""
        return self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it, None if there is no such token."""
        return self._rust.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        """Every token as the vocabulary spells it, and its id."""
        return self._rust.get_vocab()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; b"" for an id without a token."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self._rust.id_to_token(token_id) or ""
            try:
                known = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token written in plain text, not in the byte alphabet
                known = token.encode("utf-8")
            self._token_bytes[token_id] = known
        return known


class Detokenizer:
    """Ids to text as they come, complete characters only; what `add` and `finish` return together equals
    `tokenizer.decode` of all the ids. The work for one token does not grow with the length of the text."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The characters that this token completes; "" while one is still missing bytes."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: "" or one U+FFFD for a character that never became whole. Ready for a new text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _pattern(tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """As the Rust library finds them: the first in a text, and the longest of several that begin there."""
    spelled = sorted((token.content for token in tokens), key=len, reverse=True)
    return re.compile("(?P<token>" + ("|".join(map(re.escape, spelled)) or "(?!)") + ")")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table): bytes that print
    stand for themselves, the others get the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _guard(call: Callable[[], Any], path: File | str) -> Any:
    """Calls into the Rust library, which raises plain Exception for bad data and panics (BaseException) on some."""
    try:
        return call()
    except Exception as error:
        raise CheckpointError(f"{path} is no working tokenizer ({error}); download it again") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path} is no working tokenizer ({error}); download it again") from None


def _build(text: str, path: File) -> tokenizers.Tokenizer:
    import tokenizers

    def build() -> tokenizers.Tokenizer:
        rust = tokenizers.Tokenizer.from_str(text)
        # Some exports save the truncation and padding of their last training batch; a prompt wants neither.
        rust.no_truncation()
        rust.no_padding()
        return rust

    return _guard(build, path)


def _check_declared_ids(rust: tokenizers.Tokenizer, declared: Mapping[str, Any], path: File) -> None:
    """The Rust library numbers added tokens by itself and only logs a warning where the file says otherwise."""
    for token in declared.get("added_tokens") or ():
        content, wanted = token["content"], token["id"]
        given = rust.token_to_id(content)
        if given != wanted:
            raise CheckpointError(
                f"{path}: added token {content!r} is declared with id {wanted} but comes out as {given} "
                f"(the vocabulary has a gap or holds it already); take the file from the original checkpoint"
            )


def _check_byte_level(rust: tokenizers.Tokenizer, declared: Mapping[str, Any], path: File) -> None:
    decoder = declared.get("decoder")
    if declared["model"].get("type", "BPE") != "BPE" or not isinstance(decoder, dict) or decoder["type"] != "ByteLevel":
        raise CheckpointError(f"{path} is not a byte-level BPE; this family's are: take it from the original")
    missing = [byte for character, byte in _BYTE_OF_CHARACTER.items() if rust.token_to_id(character) is None]
    if missing:
        raise CheckpointError(
            f"{path} has no token for {len(missing)} of the 256 bytes (first: {missing[0]}): text with them would "
            f"be lost without a word; take the file from the original checkpoint"
        )


def _vocab_size(rust: tokenizers.Tokenizer, path: File) -> int:
    """One more than the largest id; the ids themselves must tell the tokens apart."""
    ids = list(_guard(rust.get_vocab, path).values())
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{path} gives two tokens the same id; download it again")
    return max(ids) + 1


def _add_tokens(rust: tokenizers.Tokenizer, config: Mapping[str, Any], path: File) -> None:
    """Adds what only tokenizer_config.json declares (in Qwen3.5 the audio tokens), and checks all of it."""
    import tokenizers

    declared = config.get("added_tokens_decoder")
    if declared is None:
        return
    try:
        entries = sorted((int(key), dict(value)) for key, value in declared.items())
    except (AttributeError, TypeError, ValueError):
        raise CheckpointError(f"{path}: added_tokens_decoder is not a table of tokens; download it again") from None
    known = {token.content for token in rust.get_added_tokens_decoder().values()}
    for wanted, entry in entries:
        content = entry.get("content")
        if not isinstance(content, str) or not content:
            raise CheckpointError(f"{path}: added_tokens_decoder[{wanted}] has no content; download it again")
        if content not in known:
            flags = {key: entry.get(key) is True for key in ("single_word", "lstrip", "rstrip", "normalized")}
            token = tokenizers.AddedToken(content, **flags)
            add = rust.add_special_tokens if entry.get("special") is True else rust.add_tokens
            _guard(lambda add=add, token=token: add([token]), path)
        given = _guard(lambda content=content: rust.token_to_id(content), path)
        if given != wanted:
            raise CheckpointError(
                f"{path}: added_tokens_decoder gives {content!r} the id {wanted}, tokenizer.json makes it {given}; "
                f"take both files from one checkpoint"
            )


def _eos_ids(rust: tokenizers.Tokenizer, config: Mapping[str, Any], path: File) -> frozenset[int]:
    """The tokenizer's own eos and the end of a turn, which some configs forget."""
    eos = config.get("eos_token")
    if isinstance(eos, dict):
        eos = eos.get("content")
    if eos is not None and (not isinstance(eos, str) or _guard(lambda: rust.token_to_id(eos), path) is None):
        raise CheckpointError(f"{path}: eos_token {eos!r} is not in the vocabulary; name one that is")
    found = {rust.token_to_id(token) for token in (eos, TURN_END) if token is not None}
    return frozenset(found - {None})
