"""The demo's processor, whose tokenizer is small."""

import pytest

from mlx_qwen35.library import load_processor
from mlx_qwen35.processor import Processor


@pytest.fixture(scope="session")
def processor() -> Processor:
    return load_processor("demo")
