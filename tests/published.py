"""Published configs and chat templates, and a folder with the small files of a published checkpoint.

Knows where they lie: configs among the facts here, the rest in the reference material beside the checkout; templates
also in trl's wheel, which has Qwen's own. The tokenizer of the reference material is rebuilt and not exact everywhere,
and large, so it is no part of this project.
"""

import functools
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIGS = Path(__file__).parent / "facts/configs"
REFERENCE = CHECKOUT.parent / "shared/model_data/hf"
FETCHED = CHECKOUT / ".published"
TRL = "trl==1.16.0"
# As Qwen publishes them, by the name they have there: what trl's wheel calls them, and their sha256.
TEMPLATES = {
    "chat_template.jinja": ("qwen3_5_think", "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715"),
    "chat_template.0.8B-2B.jinja": (
        "qwen3_5_nothink", "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80"),
    "chat_template.3.6.jinja": ("qwen3_6", "e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259"),
    "chat_template.3.8.jinja": ("qwen3_8", "c3cf9e34abf4f9e36c2d72165aa9c132d3e2a725b6c2586aaa3a8af9d7a81041"),
    "chat_template.3.8-2.4T.jinja": (None, "40ce34a5bcbc0231462740761215bc31a83882a8b3a4b6aa1c6e869b95945e4e"),
}  # fmt: skip

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


def published_template(name: str) -> str:
    """A chat template as it is published; skips the test where it is not to be had."""
    inside, digest = TEMPLATES[name]
    path = REFERENCE / name
    if not path.exists():
        if inside is None:
            pytest.skip(f"{name} lies in the reference material only, and there is none beside the checkout")
        path = _fetched() / f"{inside}.jinja"
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest, f"{path} is not what was published"
    return data.decode("utf-8")


@functools.cache
def _fetched() -> Path:
    """The folder of templates in trl's wheel, fetched once."""
    folder = FETCHED / TRL
    if folder.is_dir():
        return folder
    FETCHED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FETCHED) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", scratch, TRL], capture_output=True, text=True)
        wheels = [*Path(scratch).glob("*.whl")]
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            pytest.skip(f"{TRL}, which has the published chat templates, cannot be fetched: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [entry for entry in wheel.namelist() if entry.startswith("trl/chat_templates/qwen3_")]
            wheel.extractall(scratch, names)
        try:
            (Path(scratch) / "trl/chat_templates").replace(folder)
        except OSError:
            if not folder.is_dir():  # another process was quicker
                raise
    return folder


def write_published_files(model_data: Path, folder: Path) -> Path:
    """As published: the tokens from 248070 on stand only in tokenizer_config.json."""
    tokenizer = json.loads(gzip.decompress((model_data / "qwen35_tokenizer_reconstructed.json.gz").read_bytes()))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 248070]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    for published, name in _FILES:
        shutil.copy(model_data / published, folder / name)
    return folder
