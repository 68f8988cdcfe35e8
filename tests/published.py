"""Published configs, and a folder with the small files of a published checkpoint, from the reference material beside
the checkout.

Knows where both lie. The tokenizer of the reference material is rebuilt and not exact everywhere, and large, so it is
no part of this project.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "facts/configs"

_FILES = (
    ("hf/tokenizer_config.rebuilt.json", "tokenizer_config.json"),
    ("hf/generation_config.3.5.json", "generation_config.json"),
    ("hf/chat_template.jinja", "chat_template.jinja"),
    ("hf/preprocessor_config.json", "preprocessor_config.json"),
    ("hf/video_preprocessor_config.json", "video_preprocessor_config.json"),
    ("configs/Qwen3.5-27B.json", "config.json"),
)


def published_config(name: str) -> dict[str, Any]:
    """config.json of a model that is called so on the Hub ("Qwen3.5-27B"); tests/facts/README.md has the sources."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def write_published_files(model_data: Path, folder: Path) -> Path:
    """As published: the tokens from 248070 on stand only in tokenizer_config.json."""
    tokenizer = json.loads(gzip.decompress((model_data / "qwen35_tokenizer_reconstructed.json.gz").read_bytes()))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 248070]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    for published, name in _FILES:
        shutil.copy(model_data / published, folder / name)
    return folder
