"""GGUFs against llama.cpp itself: what it computes from ours, and what we compute from its own.

Runs only where asked for, because llama.cpp is built first (tests/peers/llama_cpp/build.py):

    pytest tests/peers/test_llama_cpp.py --llama-cpp=FOLDER

Logits are compared in float32 on both sides: llama.cpp rounds activations where weights are not F32, so its own
quantizer decodes a file to F32 before it is asked.
"""

import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.text.tokenizer import Tokenizer
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conversion.gguf.expected import write_companions
from tests.peers.llama_cpp.build import built
from tests.published import write_published_files
from tests.tiny_model import run, some_tokens

# Heads whose permutation is not its own inverse; rows that blocks of 256 divide, and 32 only.
SIZES = {
    "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 270,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "mtp_num_hidden_layers": 1,
    "rope_parameters": {"partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]},
}  # fmt: skip
FFN = {
    "dense": {"intermediate_size": 352},
    "moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 96, "num_experts": 16},
}
F32, Q4_0, Q4_1, Q8_0, Q2_K, Q3_K_M, Q4_K_M, Q5_K_M, Q6_K, IQ4_NL, IQ4_XS, MXFP4_MOE = (
    0, 2, 3, 7, 10, 12, 15, 17, 18, 25, 30, 38
)  # fmt: skip
CLOSE = 2e-4  # of the logits' standard deviation


class Probe:
    """tests/peers/llama_cpp/probe.cpp."""

    def __init__(self, program: Path):
        self._program = program

    def __call__(self, *words: object) -> None:
        command = [str(word) for word in (self._program, *words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"probe {words[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}"

    def logits(self, model: Path, tokens: list[int]) -> np.ndarray:
        """[tokens, vocabulary] of a file, decoded to F32."""
        decoded, ids, out = (model.with_suffix(end) for end in (".f32.gguf", ".ids", ".out"))
        self("quantize", model, decoded, F32)
        np.array(tokens, np.int32).tofile(ids)
        self("logits", decoded, ids, out)
        return np.fromfile(out, np.float32).reshape(len(tokens), -1)

    def ids(self, model: Path, text: str) -> list[int]:
        given, out = model.with_suffix(".txt"), model.with_suffix(".out")
        given.write_text(text, encoding="utf-8", newline="")
        self("tokens", model, given, out)
        return np.fromfile(out, np.int32).tolist()


@pytest.fixture(scope="module")
def probe(pytestconfig: pytest.Config) -> Probe:
    folder = pytestconfig.getoption("--llama-cpp")
    if folder is None:
        pytest.skip("llama.cpp is built only where asked for: --llama-cpp=FOLDER")
    return Probe(built(Path(folder).absolute()))


@pytest.fixture(scope="module", params=["dense", "moe"])
def source(request: pytest.FixtureRequest, probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, and its file in F32 beside it."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    config = tiny_config(request.param, vision=True, **SIZES, **FFN[request.param])
    write_checkpoint(folder, config, random_tensors(config, 5), dtype="bfloat16")
    write_companions(folder, SIZES["vocab_size"])
    convert(folder, folder.with_name("f32.gguf"), outtype="f32")
    return folder


def check(probe: Probe, model: Path, ours: Path) -> None:
    """Logits of llama.cpp on `model` are those of this package on `ours`."""
    net = load_model(ours)
    for length in (37, 150):
        tokens = some_tokens(length, vocab=SIZES["vocab_size"])
        meant, found = run(net, tokens), probe.logits(model, tokens)
        apart, spread = np.abs(found - meant).max(), meant.std()
        print(f"{model.name}, {length} tokens: {apart:.1e} apart, standard deviation {spread:.2f}")
        assert apart <= CLOSE * spread
        assert (found.argmax(-1) == meant.argmax(-1)).all()


@pytest.mark.parametrize("outtype", ["f32", "bf16", "f16"])
def test_out_plain(probe: Probe, source: Path, tmp_path: Path, outtype: str) -> None:
    """llama.cpp on our file is this package on the checkpoint."""
    check(probe, convert(source, tmp_path / f"{outtype}.gguf", outtype=outtype), source)


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "q4_1", "mxfp4"])
def test_out_quantized(probe: Probe, source: Path, tmp_path: Path, outtype: str) -> None:
    """llama.cpp on our file is this package on the same file."""
    if (source.name, outtype) == ("dense", "mxfp4"):
        pytest.skip("llama.cpp has mxfp4 for experts only")
    out = convert(source, tmp_path / f"{outtype}.gguf", outtype=outtype)
    check(probe, out, out)


@pytest.mark.parametrize(("outtype", "number"), [("q8_0", Q8_0), ("q4_0", Q4_0), ("q4_1", Q4_1), ("mxfp4", MXFP4_MOE)])
def test_bytes_are_those_of_its_quantizer(
    probe: Probe, source: Path, tmp_path: Path, outtype: str, number: int
) -> None:
    if (source.name, outtype) == ("dense", "mxfp4"):
        pytest.skip("llama.cpp has mxfp4 for experts only")
    ours = convert(source, tmp_path / f"{outtype}.gguf", outtype=outtype)
    probe("quantize", source.with_name("f32.gguf"), tmp_path / "theirs.gguf", number)
    readers = (GGUFReader(path) for path in (ours, tmp_path / "theirs.gguf"))
    one, two = ({tensor.name: tensor for tensor in reader.tensors} for reader in readers)
    assert one.keys() == two.keys()
    same = [name for name in one if one[name].tensor_type == two[name].tensor_type]
    assert any(one[name].tensor_type.name == outtype.upper() for name in same)
    odd = {name: np.mean(one[name].data != two[name].data) for name in same}
    print(f"{outtype}: {len(same)} of {len(one)} tensors have one type; bytes that differ: {max(odd.values()):.1e}")
    assert max(odd.values()) == 0


@pytest.mark.parametrize("number", [Q2_K, Q3_K_M, Q4_K_M, Q5_K_M, Q6_K, IQ4_NL, IQ4_XS, Q8_0, Q4_0, Q4_1, MXFP4_MOE])
def test_in(probe: Probe, source: Path, tmp_path: Path, number: int) -> None:
    """This package on a file of its quantizer is llama.cpp on the same file."""
    path = tmp_path / f"{number}.gguf"
    probe("quantize", source.with_name("f32.gguf"), path, number)
    check(probe, path, path)


def test_vocabulary(probe: Probe, tmp_path: Path, shared_dir: Path) -> None:
    """The published vocabulary through our file: its ids are tokenizer.json's, of texts that are composed (NFC)."""
    config = tiny_config("dense", **SIZES | {"hidden_size": 32, "vocab_size": 248320}, **FFN["dense"])
    (tmp_path / "a").mkdir()
    write_published_files(shared_dir / "model_data", tmp_path / "a")
    write_checkpoint(tmp_path / "a", config, random_tensors(config, 5), dtype="bfloat16")
    out = convert(tmp_path / "a", tmp_path / "a.gguf")
    tokenizer = Tokenizer.from_folder(tmp_path / "a")
    paths = sorted((shared_dir / "model_data/kitoken").glob("*_input.txt"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    for text in [*texts, "<|im_start|>user\nIt's 2 o'clock<think>\n\n</think>déjà 日本 😀 <|fim_pad|><tts_pad>"]:
        text = unicodedata.normalize("NFC", text)
        assert probe.ids(out, text) == tokenizer.encode(text)
