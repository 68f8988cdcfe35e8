"""Makes the demo's tokenizer: Qwen3.5's pre-tokenizer and special tokens over a small byte-level BPE vocabulary.

    python tools/train_demo/tokenizer.py     writes tokenizer.json and tokenizer_config.json into the demo folder

The corpus is drawn from the curriculum: run again after the curriculum has changed, it makes another vocabulary, and a
checkpoint trained with the old one is lost. The packaged one was made before follow-up questions were added.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from case import draw
from geometry import VOCAB_SIZE
from text_skills import TEXT_SKILLS, UNSCORED

DEMO = Path(__file__).parents[2] / "mlx_qwen35" / "demo"

# The split of Qwen3.5's tokenizer.json: letters with marks, single digits, runs of punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PLAIN = (  # added, but not special: they stay visible when special tokens are skipped
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
AUDIO = (
    "<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|>"
).split()


def corpus(cases: int = 30000) -> Iterator[str]:
    rng = random.Random("tokenizer")
    makers = [*TEXT_SKILLS.values(), *UNSCORED.values()]
    for i in range(cases):
        case = draw(makers[i % len(makers)], rng, held_out=False)
        yield "\n".join(str(m["content"]) for m in case.messages)
        yield case.reply
        if case.tools:
            yield "\n".join(json.dumps(t) for t in case.tools)
    from picture_skills import PICTURE_SKILLS

    for maker in PICTURE_SKILLS.values():
        for _ in range(300):
            case = draw(maker, rng, held_out=False)
            yield case.messages[0]["content"][-1]["text"]
            yield case.reply
    for _ in range(3000):
        yield "system\nuser\nassistant\n\n# Tools\n\nYou may call these functions:\n\n <1.2 seconds>"


def main() -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL) + len(PLAIN) + len(AUDIO)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in AUDIO])
    tokenizer.save(str(DEMO / "tokenizer.json"), pretty=False)
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (DEMO / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
