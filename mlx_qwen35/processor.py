"""What a user asks to the token ids a model reads: tokenizer and chat template of one checkpoint, together.

Knows messages, tools and the context length. Knows nothing of weights, caches or sampling.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.text.files import read_json_object
from mlx_qwen35.text.template import ChatTemplate
from mlx_qwen35.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

_MEDIA_KEYS = frozenset({"image", "image_url", "video", "video_url"})


@dataclass(frozen=True)
class Prompt:
    """tokens: what the model reads; text: what they were made of (None if they came as ids); thinking: the prompt
    ends inside <think>, so that the reply begins with reasoning."""

    tokens: list[int]
    text: str | None
    thinking: bool


@dataclass(frozen=True)
class Processor:
    """The text side of one checkpoint. eos_token_ids: every id that ends a turn, by any file of the checkpoint;
    generation_config: the file of that name ({} if there is none); context_length: most tokens of a prompt."""

    tokenizer: Tokenizer
    template: ChatTemplate
    config: ModelConfig
    eos_token_ids: frozenset[int]
    generation_config: dict[str, Any] = field(repr=False)
    context_length: int

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig, *, context_length: int | None = None) -> Processor:
        """Reads tokenizer.json, tokenizer_config.json, the chat template and generation_config.json. Raises
        CheckpointError naming the file if one is missing, damaged or does not fit the model."""
        folder = Path(folder)
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
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def prompt(
        self,
        prompt: str | Messages | Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        system: str | None = None,
    ) -> Prompt:
        """The prompt of one turn. `prompt` is a text (one user message), a list of messages as OpenAI's API has them,
        or token ids (a list, or an array [T]), taken as they are: tools and enable_thinking then are in them already.

        enable_thinking None leaves it to the checkpoint's template. Raises PromptError if it is empty, is not such a
        list, is refused by the template, or is longer than the context.
        """
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise PromptError(f"a prompt is a text, a list of messages or a list of ids, not {type(prompt).__name__}")
        if len(prompt) == 0:
            raise PromptError("the prompt is empty; write a message")
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            tokens, text = self._check_ids(prompt, system), None
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt)
            text = self.template.render(
                _with_system(messages, system), tools=_tools(tools), enable_thinking=enable_thinking
            )
            tokens = self.encode(text)
        if not tokens:
            raise PromptError("the chat template made an empty prompt of these messages; check the template")
        if len(tokens) > self.context_length:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, the context {self.context_length}; shorten it or load the "
                f"model with a larger context_length"
            )
        return Prompt(tokens, text, _ends_in_thinking(self.decode(tokens) if text is None else text))

    def _check_ids(self, ids: Sequence[int], system: str | None) -> list[int]:
        if system is not None:
            raise PromptError("system= cannot be added to token ids; put it into the ids, or pass messages")
        size = self.config.text.vocab_size
        for at, token in enumerate(ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
                raise PromptError(f"prompt[{at}] is {token!r}; an id of this model is a whole number below {size}")
        return list(ids)


def _eos_ids(generation_config: Mapping[str, Any], path: Path) -> frozenset[int]:
    value = generation_config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in values):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}; it must be an id or a list of ids")
    return frozenset(values)


def _ends_in_thinking(text: str) -> bool:
    """Whether the last turn opened <think> and left it open."""
    turn = text[text.rfind("<|im_start|>") + 1 :]
    return turn.rfind("<think>") > turn.rfind("</think>")


def _with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise PromptError("system= is given, but the messages begin with a system message; use one of the two")
    return [{"role": "system", "content": system}, *messages]


def _messages(messages: Messages) -> list[dict[str, Any]]:
    """Copies in the form that chat templates read. The caller's messages are left as they are."""
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f'{where} is no message; write {{"role": "user", "content": "..."}}')
    message = dict(message)
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = [_part(part, f"{where}.content[{at}]") for at, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise PromptError(f"{where}.content is a {type(content).__name__}; write text (json.dumps for a tool's result)")
    if isinstance(message.get("reasoning"), str) and message.get("reasoning_content") is None:
        message["reasoning_content"] = message["reasoning"]
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, (list, tuple)):
            raise PromptError(f"{where}.tool_calls is a {type(calls).__name__}; it must be a list")
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return message


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise PromptError(f'{where} is no part of a message; write {{"type": "text", "text": "..."}}')
    media = _MEDIA_KEYS.intersection([*part, part.get("type")])
    if media:
        raise PromptError(f"{where} holds {min(media)!r}; this version reads text only")
    if not isinstance(part.get("text"), str):
        raise PromptError(f'{where} has no text; write {{"type": "text", "text": "..."}}')
    return dict(part)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """The call with its arguments as a dict: OpenAI's API carries them as JSON text, templates loop over them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f'{where} is no call; write {{"function": {{"name": "...", "arguments": {{...}}}}}}')
    function = dict(function)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: the arguments are not valid JSON ({error}); pass a dict") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{where}: the arguments are a {type(arguments).__name__}; pass a dict, or one as JSON")
    function["arguments"] = dict(arguments)
    return {**call, "function": function} if "function" in call else function


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    for at, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(
                f'tools[{at}] is no tool; write {{"type": "function", "function": {{"name": "...", '
                f'"description": "...", "parameters": {{...}}}}}}'
            )
    return list(tools) if tools else None
