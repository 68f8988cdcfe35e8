"""The model that answers in a chat, and how another takes its place.

Knows flags, names and memory. Knows nothing of what is said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli import opening, options, ranks
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.machine.files import listed

if TYPE_CHECKING:
    from mlx_qwen35.conversation import Conversation
    from mlx_qwen35.library import Held
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor


_SPARE = 1.2  # of a model's files: what reading them and a first prompt take besides


class Models:
    def __init__(self, args: argparse.Namespace, held: Held, model: Model, processor: Processor) -> None:
        self._args, self._held = args, held
        self.model, self.processor = model, processor

    @property
    def name(self) -> str:
        return self._args.model or "demo"

    def settings(self) -> dict[str, Any]:
        """Of the answers, as the flags say for this model."""
        return options.answer_options(self._args, self.processor) | opening.draft_options(self._args, self.model)

    def names(self) -> list[str]:
        """Of the models on this machine, for Tab."""
        from mlx_qwen35.library import list_models

        return ["demo", *(model.name for model in list_models() if model.complete)]

    def change(self, name: str, talk: Conversation) -> None:
        """Loads another model, which goes on with what was said, and gives the memory of the one before back.

        The flags hold for it too, but an adapter and a draft model, which belong to the one before. Where both fit into
        memory, the new one is loaded first. Otherwise the old one makes room, and comes back if the new one cannot be
        loaded; it then reads again what was said. Raises what loading raises.
        """
        from mlx_qwen35 import library

        if ranks.count_of(self._args) > 1:
            raise ArgumentError("a chat on ranks cannot switch models: leave it, and start one with the other model")
        before = self._args, self._held
        args = argparse.Namespace(**{**vars(self._args), "model": name, "adapter_path": None, "draft_model": None})
        args.num_draft_tokens = args.num_draft_tokens if args.mtp else None
        # What costs little is tried first.
        folder = opening.find_model(args)
        talk.check(library.load_processor(folder, context_length=args.context_length, yarn=args.yarn))
        beside = _fit_together(folder)
        if not beside:
            print(f"{self.name} is unloaded to make room for {name}.", file=sys.stderr)
            talk.forget_computed()
            self.model.unload()
        try:
            held = opening.hold(args)
            processor = opening.load_processor(args, held)
            model = opening.load_model(args, held)
            settings = options.answer_options(args, processor) | opening.draft_options(args, model)
        except BaseException:
            if not beside:
                self._args, self._held = before
                self.model = opening.load_model(*before)
                talk.change_model(self.model, self.processor, self.settings())
                print(f"{self.name} is loaded again.", file=sys.stderr)
            raise
        old = self.model
        self._args, self._held, self.model, self.processor = args, held, model, processor
        talk.change_model(model, processor, settings)
        if beside:
            old.unload()


def _fit_together(folder: Path) -> bool:
    """Whether a model's files fit into what is left beside the one that is loaded."""
    from mlx_qwen35.library.memory import memory_left

    size = sum(file.stat().st_size for file in listed(folder, "*.safetensors"))
    return _SPARE * size <= memory_left()
