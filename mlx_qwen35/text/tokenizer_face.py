"""What transformers calls a tokenizer, over ours: the names that mlx-lm's tools ask for.

Knows those names, and mlx-lm's wrapper around them. Everything else is the tokenizer's and the template's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_qwen35.text.messages import check_messages, each_part, in_order
from mlx_qwen35.text.rendering import render
from mlx_qwen35.text.template import ChatTemplate
from mlx_qwen35.text.tokenizer import TURN_END, Tokenizer
from mlx_qwen35.text.variables import variables_of


class TokenizerFace:
    """Goes before a class that has the four below, and makes its objects tokenizers to mlx-lm."""

    tokenizer: Tokenizer
    template: ChatTemplate
    eos_token_ids: frozenset[int]
    name_or_path: str

    bos_token = None
    bos_token_id = None

    def for_mlx_lm(self) -> Any:
        """mlx-lm's TokenizerWrapper, for what asks for no less: it ends at every id that ends a turn, and knows how
        this family thinks and calls tools."""
        from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
        from mlx_lm.tool_parsers import qwen3_coder

        return TokenizerWrapper(
            self,
            BPEStreamingDetokenizer,
            eos_token_ids=self.eos_token_ids,
            tool_parser=qwen3_coder.parse_tool_call,
            tool_call_start=qwen3_coder.tool_call_start,
            tool_call_end=qwen3_coder.tool_call_end,
        )

    def __len__(self) -> int:
        return self.tokenizer.vocab_size

    def __bool__(self) -> bool:
        return True

    @property
    def eos_token_id(self) -> int:
        """The end of a turn; the other ids that end one are in `eos_token_ids`."""
        turn_end = self.tokenizer.token_id(TURN_END)
        return turn_end if turn_end in self.eos_token_ids else min(self.eos_token_ids)

    @property
    def eos_token(self) -> str:
        return self.tokenizer.decode([self.eos_token_id])

    @property
    def chat_template(self) -> str:
        return self.template.source

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.vocabulary()

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | None | list[int | None]:
        if isinstance(tokens, str):
            return self.tokenizer.token_id(tokens)
        return [self.tokenizer.token_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """As the vocabulary spells them; "" for an id without a token."""
        spelled = {number: token for token, number in self.get_vocab().items()}
        return spelled.get(ids, "") if isinstance(ids, int) else [spelled.get(number, "") for number in ids]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. This family has no tokens that go before or after one, so the flag changes nothing."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
        return_dict: bool = False,
        allow_control_tokens: bool = False,
        **variables: Any,
    ) -> str | list[int] | dict[str, list[int]]:
        """Messages as the template writes them, with one placeholder for a picture or a video. variables: further ones
        of the template, as text.variables has them. continue_final_message: without the end of the last turn.
        allow_control_tokens: as `Processor.prompt` has it. Raises PromptError if the template refuses them."""
        asked = variables_of(self.template).of(enable_thinking=enable_thinking, chat_template_kwargs=variables)
        rendered = render(
            self.template,
            self.tokenizer,
            each_part(in_order(check_messages(conversation)), lambda part: {"type": part.kind}),
            tools=tools,
            variables=asked,
            add_generation_prompt=add_generation_prompt,
            allow_control_tokens=allow_control_tokens,
        )
        if continue_final_message and TURN_END in rendered.text:
            rendered = replace(rendered, text=rendered.text[: rendered.text.rfind(TURN_END)])
        if not tokenize:
            return rendered.readable()
        ids = rendered.tokens(self.tokenizer)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} if return_dict else ids
