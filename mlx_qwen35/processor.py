"""What a user asks to what a model reads: token ids, and the patches of pictures and videos among them.

Knows how tokenizer, chat template and picture preparation of one checkpoint go together, tools and the context length.
Knows nothing of weights, caches or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError, LengthError, PromptError
from mlx_qwen35.text.begun import last_begun
from mlx_qwen35.text.files import File, MadeFolder, as_folder, read_json_object
from mlx_qwen35.text.messages import (
    MediaPart,
    Messages,
    check_messages,
    each_part,
    in_order,
    media_parts,
    with_media,
    with_system,
)
from mlx_qwen35.text.placeholders import Placeholders
from mlx_qwen35.text.rendering import render
from mlx_qwen35.text.template import ChatTemplate
from mlx_qwen35.text.tokenizer import Tokenizer
from mlx_qwen35.text.tokenizer_face import TokenizerFace
from mlx_qwen35.text.variables import variables_of
from mlx_qwen35.vision.images import prepare_image
from mlx_qwen35.vision.limits import IMAGE_FILE, VIDEO_FILE, MediaLimits, read_limits
from mlx_qwen35.vision.media import Media
from mlx_qwen35.vision.positions import place
from mlx_qwen35.vision.video import VideoLimits, prepare_video

TURN_START, THINK = "<|im_start|>", "<think>"


@dataclass(frozen=True)
class Prompt:
    """tokens: what the model reads; text: what they were made of (None if they came as ids); thinking: the prompt
    ends inside <think>, so that the reply begins with reasoning; media: the pictures and videos whose placeholders are
    among the tokens, in their order; turns: where turns of a conversation begin, the one to be written included;
    continued: what there is already of the reasoning or content that the reply goes on with."""

    tokens: list[int]
    text: str | None
    thinking: bool
    media: tuple[Media, ...] = ()
    turns: tuple[int, ...] = ()
    continued: str = ""


@dataclass(eq=False)  # not frozen: mlx-lm sets a name of its own on what it takes for a tokenizer
class Processor(TokenizerFace):
    """How one checkpoint reads prompts; also what mlx-lm's tools take for a tokenizer (text/tokenizer_face.py).

    eos_token_ids: every id that ends a turn, by any file of the checkpoint; generation_config: the file of that name
    ({} if there is none); context_length: most tokens of a prompt; media_limits: how it wants pictures and videos
    prepared (None: it has no vision tower)."""

    tokenizer: Tokenizer
    template: ChatTemplate
    config: ModelConfig
    eos_token_ids: frozenset[int]
    generation_config: dict[str, Any] = field(repr=False)
    context_length: int
    media_limits: MediaLimits | None = None

    @classmethod
    def from_folder(
        cls, folder: str | Path | MadeFolder, config: ModelConfig, *, context_length: int | None = None
    ) -> Processor:
        """Reads tokenizer.json, tokenizer_config.json, the chat template, generation_config.json and the preprocessor
        files. Raises CheckpointError naming the file if one is missing, damaged or does not fit the model."""
        folder = as_folder(folder)
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer.vocab_size > config.text.vocab_size:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} makes ids up to {tokenizer.vocab_size - 1}, the model has embeddings up "
                f"to {config.text.vocab_size - 1}; take tokenizer and weights from one checkpoint"
            )
        generation_path = folder / "generation_config.json"
        generation_config = read_json_object(generation_path, optional=True)
        eos = tokenizer.eos_token_ids.union(config.eos_token_ids, _eos_ids(generation_config, generation_path))
        if not eos:
            raise CheckpointError(f"{folder}: no file names an end-of-text token; add eos_token_id to config.json")
        return cls(
            tokenizer=tokenizer,
            template=ChatTemplate.from_folder(folder),
            config=config,
            eos_token_ids=eos,
            generation_config=generation_config,
            context_length=context_length or config.text.max_position_embeddings,
            media_limits=read_limits(folder, config.vision) if config.vision else None,
        )

    @property
    def name_or_path(self) -> str:
        """Whose tokenizer it is, for mlx-lm."""
        return str(self.config.raw.get("_name_or_path") or self.config.raw["model_type"])

    def prompt(
        self,
        prompt: str | Messages | Sequence[int],
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        system: str | None = None,
        fps: float | None = None,
        max_pixels: int | None = None,
        fetch: bool = False,
        reasoning_effort: str | None = None,
        preserve_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
        continue_final_message: bool = False,
    ) -> Prompt:
        """The prompt of one turn. `prompt` is a text (one user message), a list of messages as OpenAI's API has them,
        or token ids (a list, or an array [T]), taken as they are: tools and enable_thinking then are in them already,
        and as many placeholders as the images, then the videos need.

        images, videos: each in any form that vision.images and vision.video read, or Media. They fill the parts of
        messages that have no source, or go before the last user message, images first. Contents may hold them as well
        (text.messages has the forms). fps, max_pixels: see `prepare_image` and `prepare_video`. fetch: read http(s)
        URLs from the network.
        enable_thinking, reasoning_effort, preserve_thinking, chat_template_kwargs: variables of the checkpoint's
        template, as text.variables has them; None leaves them to it. A control token that a message, a tool or a
        variable spells is text, unless allow_control_tokens: then "<|im_start|>" opens a turn whoever wrote it.
        continue_final_message: the last message is an assistant's, and the reply goes on with its content, as it stands
        there; or with its reasoning_content, where it has no content yet and thinking is on (text.begun).
        Raises PromptError if the prompt is empty, is not such a list, is refused by the template, shows what cannot be
        read or this model cannot see, or is longer than the context.
        """
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise PromptError(f"a prompt is a text, a list of messages or a list of ids, not {type(prompt).__name__}")
        if len(prompt) == 0:
            raise PromptError("the prompt is empty; write a message")
        reading = {"fps": fps, "max_pixels": max_pixels, "fetch": fetch}
        variables = variables_of(self.template).of(
            enable_thinking=enable_thinking,
            reasoning_effort=reasoning_effort,
            preserve_thinking=preserve_thinking,
            chat_template_kwargs=chat_template_kwargs,
        )
        continued = ""
        if continue_final_message and (isinstance(prompt, str) or isinstance(prompt[0], int)):
            raise PromptError(
                "continue_final_message: a text is a user's message, and token ids go on as they are; give a list of "
                "messages whose last is an assistant's"
            )
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            tokens, text = self._check_ids(prompt, system), None
            shown = with_media([{"role": "user", "content": []}], images=images, videos=videos)
            media = tuple(self._read(part, **reading) for part in media_parts(shown))
            self._check_places(tokens, media)
            thinking = _ends_in_thinking(self._control_text(tokens))
        else:
            messages = check_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
            messages = in_order(with_media(with_system(messages, system), images=images, videos=videos))
            begun = None
            if continue_final_message:
                messages, begun = last_begun(messages, splits_reasoning=self.template.splits_reasoning)
            parts = media_parts(messages)
            placeholders = self._placeholders(parts) if parts else None
            rendered = render(
                self.template,
                self.tokenizer,
                each_part(messages, lambda part: {"type": part.kind}),
                tools=_tools(tools),
                variables=variables,
                begun=begun,
                allow_control_tokens=allow_control_tokens,
            )
            media = ()
            if placeholders:
                placeholders.check(rendered.text, [part.kind for part in parts])
                media = tuple(self._read(part, **reading) for part in parts)
                rendered = replace(rendered, text=placeholders.expanded(rendered.text, media))
            tokens, text = rendered.tokens(self.tokenizer), rendered.readable()
            thinking, continued = _ends_in_thinking(rendered.text), rendered.continued
        if not tokens:
            raise PromptError("the chat template made an empty prompt of these messages; check the template")
        if len(tokens) > self.context_length:
            seen = sum(medium.tokens for medium in media)
            shown = f", {seen} of them for pictures and videos (max_pixels= or fps= makes them fewer)" if seen else ""
            raise LengthError(
                f"the prompt has {len(tokens)} tokens{shown}, the context {self.context_length}; shorten it or load "
                f"the model with a larger context_length",
                len(tokens),
                self.context_length,
            )
        turn = self.tokenizer.token_id(TURN_START)
        turns = tuple(at for at, token in enumerate(tokens) if token == turn)
        return Prompt(tokens, text, thinking, media, turns, continued)

    def prepare(
        self, messages: Messages, *, fps: float | None = None, max_pixels: int | None = None, fetch: bool = False
    ) -> list[dict[str, Any]]:
        """Copies of messages whose pictures and videos are read: a Media in place of each source, so that a longer
        conversation does not read them again. Raises PromptError as `prompt` does."""
        checked = check_messages(messages)
        without = next((part for part in media_parts(checked) if part.source is None), None)
        if without is not None:
            raise PromptError(f"{without} has no source; write it into the message")

        def read(part: MediaPart) -> dict[str, Any]:
            medium = self._read(part, fps=fps, max_pixels=max_pixels, fetch=fetch)
            return {"type": part.kind, part.kind: medium}

        return each_part(checked, read)

    def _read(self, part: MediaPart, *, fps: float | None, max_pixels: int | None, fetch: bool) -> Media:
        """The picture or video of a part, prepared for this model."""
        seen = self._check_seen(part)
        if isinstance(part.source, Media):
            if part.source.kind != part.kind:
                raise PromptError(f"{part} holds a Media of kind {part.source.kind!r}; put it where that kind belongs")
            return part.source
        limits, file = (seen.image, IMAGE_FILE) if part.kind == "image" else (seen.video, VIDEO_FILE)
        if limits is None:
            raise PromptError(
                f"{part} cannot be prepared: this checkpoint has no {file}; copy it from the checkpoint that this "
                "folder was made from"
            )
        most = part.max_pixels or max_pixels
        try:
            if isinstance(limits, VideoLimits):
                return prepare_video(part.source, limits, fps=part.fps or fps, max_pixels=most, fetch=fetch)
            return prepare_image(part.source, limits, max_pixels=most, fetch=fetch)
        except PromptError as error:
            raise PromptError(f"{part}: {error}") from error

    def _check_seen(self, part: MediaPart) -> MediaLimits:
        if self.media_limits is None:
            raise PromptError(
                f"{part} cannot be seen by this checkpoint, which has no vision tower: give it text only, or load one "
                "that has"
            )
        return self.media_limits

    def _placeholders(self, parts: Sequence[MediaPart]) -> Placeholders:
        self._check_seen(parts[0])
        config = self.config
        ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        texts = ["" if token is None else self.decode([token]) for token in ids]
        if not all(texts):
            raise CheckpointError(
                "config.json and tokenizer.json do not agree on image_token_id, video_token_id, vision_start_token_id "
                "and vision_end_token_id; take both from one checkpoint"
            )
        return Placeholders(*texts)

    def _control_text(self, tokens: list[int]) -> str:
        """The text of ids without what is only spelled in it, if this tokenizer has tokens for reasoning."""
        control = self.tokenizer.control_tokens
        if THINK not in control:
            return self.decode(tokens)
        kept = {*control.values()}
        return self.decode(token for token in tokens if token in kept)

    def _check_places(self, tokens: list[int], media: tuple[Media, ...]) -> None:
        """Raises PromptError where the placeholders among the ids are not those of the media."""
        if media:
            place(
                np.array(tokens),
                media,
                image_token_id=self.config.image_token_id,
                video_token_id=self.config.video_token_id,
                merge=media[0].merge_size,
            )

    def _check_ids(self, ids: Sequence[int], system: str | None) -> list[int]:
        if system is not None:
            raise PromptError("system= cannot be added to token ids; put it into the ids, or pass messages")
        size = self.config.text.vocab_size
        for at, token in enumerate(ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
                raise PromptError(f"prompt[{at}] is {token!r}; an id of this model is a whole number below {size}")
        return list(ids)


def _eos_ids(generation_config: Mapping[str, Any], path: File) -> frozenset[int]:
    value = generation_config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in values):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}; it must be an id or a list of ids")
    return frozenset(values)


def _ends_in_thinking(text: str) -> bool:
    """Whether the last turn opened <think> and left it open."""
    turn = text[text.rfind(TURN_START) + 1 :]
    return turn.rfind(THINK) > turn.rfind("</think>")


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    for at, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(
                f'tools[{at}] is no tool; write {{"type": "function", "function": {{"name": "...", '
                f'"description": "...", "parameters": {{...}}}}}}'
            )
    return list(tools) if tools else None
