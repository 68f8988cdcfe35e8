"""Messages to prompt text, by the checkpoint's chat template in a sandboxed Jinja.

Knows where a checkpoint keeps its template and what templates written for transformers expect to find. Knows nothing
of tokens; what the messages must look like is the template's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.text.files import File, Folder, MadeFolder, as_folder, read_json_object, read_text

if TYPE_CHECKING:
    import jinja2

_TOKEN_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """One chat template, compiled; or several by name, of which "tool_use" is taken when tools are given.

    source: Jinja text, or name -> Jinja text with a "default"; variables: what every rendering sees besides the
    messages (eos_token, ...); where: the file named in errors. Raises CheckpointError if a source does not compile.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        variables: Mapping[str, Any] | None = None,
        where: str | Path = "chat template",
    ):
        self._where = where
        self._variables = dict(variables or {})
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            raise CheckpointError(f"{where} has no template named 'default' (only {sorted(sources)})")
        self.source = sources["default"]
        self._templates = {name: self._compile(text) for name, text in sources.items()}
        self._sources = sources

    @classmethod
    def from_folder(cls, folder: str | Path | MadeFolder) -> ChatTemplate:
        """From chat_template.jinja, else chat_template.json, else tokenizer_config.json. Raises CheckpointError if
        there is none, or if it fails on the plainest chat there is."""
        folder = as_folder(folder)
        config = read_json_object(folder / "tokenizer_config.json", optional=True)
        source, where = _find(folder, config)
        variables = {key: _token_text(config[key]) for key in _TOKEN_VARIABLES if config.get(key) is not None}
        template = cls(source, variables=variables, where=where)
        template._probe()
        return template

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        from jinja2 import meta

        return frozenset().union(*map(meta.find_undeclared_variables, self._parsed))

    @cached_property
    def words(self) -> frozenset[str]:
        """The texts that the template writes or looks for."""
        from jinja2 import nodes

        constants = (constant.value for tree in self._parsed for constant in tree.find_all(nodes.Const))
        return frozenset(value for value in constants if isinstance(value, str) and value)

    @cached_property
    def splits_reasoning(self) -> bool:
        """Whether it takes reasoning out of an answer's content (3.5 and 3.6 do, 3.8 does not)."""
        answers = ({"content": "<think>\nWhy\n</think>\n\nSo"}, {"content": "So", "reasoning_content": "Why"})
        chats = ([{"role": "user", "content": "Hello"}, {"role": "assistant", **answer}] for answer in answers)
        try:
            inside, beside = (self.render(chat, add_generation_prompt=False) for chat in chats)
        except PromptError:
            return False
        return inside == beside

    @property
    def _parsed(self) -> list[jinja2.nodes.Template]:
        return [_environment().parse(source) for source in self._sources.values()]

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt text. enable_thinking None leaves the choice to the template; `extra` are further variables of
        the template. Raises PromptError with the template's own words if it refuses the messages."""
        try:
            return self._render(messages, tools, enable_thinking, add_generation_prompt, extra)
        except PromptError:
            raise
        except Exception as error:  # a template is a program from a file: it can fail in any way
            reason = f"{type(error).__name__}: {error}"
            raise PromptError(f"the chat template ({self._where}) fails on these messages: {reason}") from error

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool | None,
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return self._templates[name].render(
            {
                **self._variables,
                "messages": messages,
                "tools": tools or None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **thinking,
                **extra,
            }
        )

    def _compile(self, source: str) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"{self._where}: the chat template is broken at line {error.lineno}: {error.message}; download it again"
            ) from None
        except Exception as error:  # constant folding and Python's own compiler run here, on text from a file
            raise CheckpointError(f"{self._where}: the chat template does not compile: {error}") from error

    def _probe(self) -> None:
        """A damaged template often compiles and fails when it runs: better at load than in the first chat."""
        try:
            self._render([{"role": "user", "content": "Hello"}], None, None, True, {})
        except PromptError:
            return  # it runs, and has wishes about the messages
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self._where}: the chat template fails on a plain chat ({reason})") from error


def _find(folder: Folder, config: Mapping[str, Any]) -> tuple[str | dict[str, str], File]:
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path), path
    path = folder / "chat_template.json"
    found = read_json_object(path, optional=True).get("chat_template")
    if found is None:
        path = folder / "tokenizer_config.json"
        found = config.get("chat_template")
    if found is None:
        raise CheckpointError(
            f"{folder} has no chat template (chat_template.jinja, chat_template.json, or chat_template in "
            f"tokenizer_config.json); copy it from the checkpoint this folder was made from"
        )
    if isinstance(found, list):
        try:
            found = {entry["name"]: entry["template"] for entry in found}
        except (KeyError, TypeError):
            raise CheckpointError(f"{path}: chat_template is a list, but not of names and templates") from None
    texts = found.values() if isinstance(found, dict) else [found]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: chat_template is not text; download the file again")
    return found, path


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


@cache
def _environment() -> jinja2.Environment:
    """What chat templates are written against: transformers' settings, filters and functions."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks assistant text for training; to a prompt it is only its contents."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Plain JSON: Jinja's own filter escapes <, > and & for HTML, which no model was trained on."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise PromptError(f"the chat template refuses these messages: {message}")

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
