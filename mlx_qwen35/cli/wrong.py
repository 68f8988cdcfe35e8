"""What is said of a command line that cannot be read: the right name beside the wrong one.

Knows the flags of this program, and what other programs call the same. Reads no values.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

# Names of mlx-lm, mlx-vlm, llama.cpp, Ollama, vLLM and transformers for what is meant by another one here.
_OTHERS = {
    "--context-length": "-c --ctx --ctx-size --context --context-size --n-ctx --num-ctx --max-context --max-kv-size "
    "--max-model-len --max-seq-len --max-length",
    "--max-tokens": "--n-predict --num-predict --max-new-tokens --max-completion-tokens --max-output-tokens --predict",
    "--repetition-penalty": "--repeat-penalty",
    "--system": "-sys --system-message --instructions",
    "--prompt": "--text --message --input --question",
    "--draft-model": "-md --model-draft --spec-draft-model --assistant-model --speculative-model",
    "--num-draft-tokens": "--draft --draft-max --draft-n --spec-draft-n-max --num-speculative-tokens",
    "--kv-bits": "-ctk -ctv --cache-type-k --cache-type-v --kv-cache-dtype",
    "--session": "--prompt-cache --prompt-cache-file --cache-file --save-session --load-session",
    "--think": "--thinking --enable-thinking --reasoning",
    "--no-think": "--no-thinking --disable-thinking --no-reasoning --nothink",
    "--thinking-budget": "--reasoning-budget --max-thinking-tokens --budget-tokens",
    "--chat-template-config": "--chat-template-kwargs",
    "--image": "--images --picture --pictures --img",
    "--video": "--videos --film",
    "--max-pixels": "--resize-shape --image-max-pixels --image-size --image-max-tokens",
    "--json-schema": "-j --schema --response-format --response-schema --format --guided-json",
    "--grammar": "--grammar-file --lark --gbnf",
    "--regex": "--guided-regex --pattern",
    "--seed": "--random-seed",
    "--temperature": "-t --temparature",
    "--model": "--hf-repo -hf --model-path --hf-path --hf-model --checkpoint --model-name --name",
    "--adapter-path": "--lora --adapter --adapter-file",
    "--stop": "--stop-sequence --stop-strings --reverse-prompt",
    "--memory": "--max-memory --ram --mem --vram --max-ram --memory-limit --gpu-memory",
    "--verbose": "--debug",
    "--stats": "--timings --perf --statistics",
    "--mlx-path": "--output -o --out --outfile --output-path --target --save-path",
    "--quantize": "--quant --quantise",
    "--q-bits": "--bits --wbits --n-bits",
    "--q-group-size": "--group-size",
    "--q-mode": "--mode --q-type --qtype --outtype --quantization",
    "--quant-predicate": "--recipe --mixed",
    "--target-size": "--size --max-size",
    "--overwrite": "--force -f --yes",
    "--parallel": "-np --n-parallel --num-parallel --max-num-seqs --max-concurrency --decode-concurrency",
    "--ttl": "--keep-alive --idle-timeout --sleep-idle-seconds",
    "--cors": "--cors-origins --allowed-origins --allow-origins --origins",
    "--cache-dir": "--ssd-cache-dir --slot-save-path --kv-cache-dir",
}
_NAMES = {theirs: ours for ours, others in _OTHERS.items() for theirs in others.split()}
_NEEDLESS = {
    "--trust-remote-code": "no code of a checkpoint is ever run",
    "--ngl": "MLX computes all layers on the GPU", "-ngl": "MLX computes all layers on the GPU",
    "--n-gpu-layers": "MLX computes all layers on the GPU", "--gpu-layers": "MLX computes all layers on the GPU",
    "--threads": "MLX chooses its threads", "-t": "MLX chooses its threads",
    "--flash-attn": "attention is MLX's own fused one anyway", "-fa": "attention is MLX's own fused one anyway",
    "--mlock": "weights that fit are kept in memory anyway", "--no-mmap": "weights are read, not mapped",
    "--jinja": "the checkpoint's template is used anyway",
    "--mmproj": "the vision tower lies in the checkpoint, and is used where it is",
    "--stream": "answers come as they are made anyway",
    "--cpu-moe": "--memory SIZE says how much may be taken, and experts that do not fit stay on the disk",
    "--n-cpu-moe": "--memory SIZE says how much may be taken, and experts that do not fit stay on the disk",
    "--upload-repo": "`hf upload` brings a folder to the Hub",
    "--dequantize": "without -q and --q-... nothing is quantized, and FP8 comes out in the dtype of --dtype",
    "--use-default-chat-template": "the checkpoint's template is used anyway",
}  # fmt: skip
_COMMANDS = {
    "generate": "ask complete prompt gen answer infer",
    "chat": "run talk repl interactive cli",
    "serve": "server start api http up",
    "convert": "quantize quantise quant pack",
    "ls": "list models show-models cache",
    "estimate": "fit info size memory plan show",
    "doctor": "check diagnose env system-info",
}


class Parser(argparse.ArgumentParser):
    """A parser whose flags are never abbreviated, and which suggests a name where it was given a wrong one.

    others: of all commands, by name, so that a flag of another is told as that.
    """

    others: Mapping[str, Parser] = MappingProxyType({})

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def refuse(self, words: Sequence[str]) -> None:
        """Ends with what is wrong with words that were not understood, and what was probably meant."""
        self.error("; ".join(self._said(words)))

    def long_after_one_dash(self, words: Sequence[str]) -> list[str]:
        """The words that would be read as a short flag with its value, and are meant as flags: -model, -ngl."""
        there = self._option_string_actions
        odd = (word for word in words if word.startswith("-") and not word.startswith("--") and len(word) > 2)
        return [word for word in odd if word in {**_NAMES, **_NEEDLESS} or f"-{word.partition('=')[0]}" in there]

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, and where to read on: a page of flags above it would hide it."""
        self.exit(2, f"error: {message}\n`{self.prog} --help` lists what there is.\n")

    def _said(self, words: Sequence[str]) -> list[str]:
        flags = [word for word in words if word.startswith("-") and word.strip("-")]
        if not flags:
            return [self._said_of_text(words)]
        return [f"{flag.partition('=')[0]} is no flag of `{self.prog}`{self._meant(flag)}" for flag in flags]

    def _said_of_text(self, words: Sequence[str]) -> str:
        text = " ".join(words)
        shown = text if len(text) <= 60 else text[:57] + "..."
        if "--prompt" not in self._option_string_actions and "--model" not in self._option_string_actions:
            return f"{shown!r} is one more than there is a place for"
        like_a_model = len(words) == 1 and " " not in text and ("/" in text or "qwen" in text.lower())
        if like_a_model or os.path.isdir(text) or "--prompt" not in self._option_string_actions:
            return f"{shown!r} is no flag: a model is given as --model {shlex.quote(shown)}"
        return f"{shown!r} is no flag: a prompt is given as -p {shlex.quote(shown)}"

    def _meant(self, flag: str) -> str:
        """What to write in the place of a flag that there is not."""
        name, _, value = flag.partition("=")
        name = "-" * (len(name) - len(name.lstrip("-"))) + name.lstrip("-").replace("_", "-")
        there = self._option_string_actions
        for spelled in (name, name.lower(), f"-{name}"):
            if spelled in there:
                return f": write {spelled}"
        ours = _NAMES.get(name.lower())
        if ours in there:
            return f": here it is {ours}{_value_of(self, ours)}"
        if name.lower() in _NEEDLESS:
            return f" and not needed: {_NEEDLESS[name.lower()]}"
        having = [command for command, other in self.others.items() if name.lower() in other._option_string_actions]
        if having and name.startswith("--"):
            return f", but of {', '.join(having[:-1])}{' and ' if having[:-1] else ''}{having[-1]}"
        # Those that begin with it, and others that are spelled alike.
        longer = [known for known in there if len(name) > 4 and known.startswith(name.lower())]
        if alike := longer or near(name.lower(), [known for known in there if known.startswith("--")]):
            return f": did you mean {' or '.join(alike[:3])}?"
        return ""


def command_named(commands: Iterable[str], word: str) -> str | None:
    """The command that is meant by a word that is none, as far as that can be said."""
    commands = list(commands)
    word = word.lower()
    if word in commands:
        return word
    others = {theirs: ours for ours, names in _COMMANDS.items() for theirs in names.split() if ours in commands}
    if word in others:
        return others[word]
    turned = [name for name in commands if sorted(name) == sorted(word)]
    return next(iter([*turned, *near(word, commands, 0.8)]), None)


def near(word: str, known: Iterable[str], alike: float = 0.7) -> list[str]:
    """At most three of the known words that are spelled alike, the most alike first. alike: difflib's ratio."""
    return difflib.get_close_matches(word, list(known), n=3, cutoff=alike)


def _value_of(parser: argparse.ArgumentParser, flag: str) -> str:
    action = parser._option_string_actions[flag]
    return f" {action.metavar}" if action.nargs is None and isinstance(action.metavar, str) else ""
