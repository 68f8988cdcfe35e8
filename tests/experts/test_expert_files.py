"""Where experts are said to lie is what the loader makes of the same files, in every form; others are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint import load
from mlx_qwen35.checkpoint.expert_files import expert_layouts
from mlx_qwen35.checkpoint.load import load_model, read_config
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.cast import converter
from mlx_qwen35.experts.layout import LayerLayout
from mlx_qwen35.experts.reader import Reader, Target

from ..checkpoint.foreign import write_fp8, write_gptq
from ..checkpoints import random_tensors, tiny_config, write_checkpoint

EXPERTS = 6
SIZES = {"num_experts": EXPERTS, "moe_intermediate_size": 32, "hidden_size": 64, "num_hidden_layers": 2}
CONFIG = tiny_config("moe", **SIZES)
WORDS = {"F32": np.uint32, "U32": np.uint32, "F16": np.uint16, "BF16": np.uint16, "U8": np.uint8}


def written(folder: Path, layout: str = "hf", dtype: str = "bfloat16", shards: int = 1) -> Path:
    return write_checkpoint(folder, CONFIG, random_tensors(CONFIG), layout=layout, dtype=dtype, shards=shards)


FORMS: dict[str, Callable[[Path], Path]] = {
    "fused": lambda folder: written(folder / "a"),
    "fused in shards": lambda folder: written(folder / "a", "hf", "float16", 3),
    "per expert": lambda folder: written(folder / "a", "hf-per-expert"),
    "per expert in shards": lambda folder: written(folder / "a", "hf-per-expert", "float32", 4),
    "mlx": lambda folder: written(folder / "a", "mlx", "float16"),
    "mlx text": lambda folder: written(folder / "a", "mlx-text", shards=2),
    "4 bits": lambda folder: convert(written(folder / "a"), folder / "b", bits=4, group_size=32),
    "mxfp4": lambda folder: convert(written(folder / "a"), folder / "b", mode="mxfp4"),
    "packed": lambda folder: convert(written(folder / "a"), folder / "b", bits=5, group_size=32, pack_experts=True),
    "packed floats": lambda folder: convert(written(folder / "a"), folder / "b", bits=None, pack_experts=True),
}


def layouts_of(folder: Path) -> dict[int, LayerLayout]:
    return expert_layouts(open_source(folder, read_config(folder)))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_is_what_is_loaded(tmp_path: Path, form: str) -> None:
    folder = FORMS[form](tmp_path)
    layouts, model = layouts_of(folder), load_model(folder)
    assert sorted(layouts) == [0, 1]
    with Reader(layouts, threads=2, job_bytes=3000) as reader:
        for number, layout in layouts.items():
            assert (layout.layer, layout.num_experts) == (number, EXPERTS)
            held = dict(flat(model.layers[number].mlp.experts))
            assert {tensor.name for tensor in layout.tensors} == held.keys()
            for expert in range(EXPERTS):
                arrays = [np.zeros(held[tensor.name][expert].nbytes, np.uint8) for tensor in layout.tensors]
                cast = [None if t.dtype in ("U32", "U8") else converter(t.dtype, "float32") for t in layout.tensors]
                pairs = zip(arrays, cast, strict=True)
                reader.submit(number, expert, [Target(memoryview(array), how) for array, how in pairs]).wait()
                for tensor, array in zip(layout.tensors, arrays, strict=True):
                    expected = np.array(held[tensor.name][expert])
                    assert tensor.shape == expected.shape
                    assert array.tobytes() == expected.tobytes(), (form, number, expert, tensor.name)
    packed = form.startswith("packed")
    assert all(("layer-0000" in file.name) == packed for layout in layouts.values() for file in layout.files)


def flat(experts: object) -> list[tuple[str, mx.array]]:
    return [
        (f"{name}.{kind}", value)
        for name in ("gate_proj", "up_proj", "down_proj")
        for kind, value in experts[name].parameters().items()
    ]


def test_halves_of_one_tensor_lie_side_by_side(tmp_path: Path) -> None:
    """Gate and up of an expert are one stretch of a published file, and one call."""
    layout = layouts_of(written(tmp_path / "a"))[1]
    gate, up, down = (layout.extents(3)[[t.name for t in layout.tensors].index(f"{p}_proj.weight")]
                      for p in ("gate", "up", "down"))  # fmt: skip
    assert up.offset == gate.offset + gate.nbytes
    assert len(layout.jobs(3, 1 << 20)[0]) == 2
    assert down.nbytes == gate.nbytes


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return convert(written(folder / "a"), folder / "b", bits=4, group_size=32, pack_experts=True)


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Change the header of a safetensors file, whose length must not."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def change_parts(change: Callable[[list[dict]], object]) -> Callable[[dict], None]:
    def on(header: dict) -> None:
        parts = json.loads(header["__metadata__"]["parts"])
        change(parts)
        header["__metadata__"]["parts"] = json.dumps(parts)

    return on


def about(**values: str) -> Callable[[dict], None]:
    return lambda header: header["__metadata__"].update(values)


HEADERS: dict[str, tuple[Callable[[dict], object], str]] = {
    "another format": (about(format="pt"), "is no file of expert records that this version reads"),
    "a later version": (about(version="2"), "is no file of expert records that this version reads"),
    "no parts": (lambda h: h["__metadata__"].pop("parts"), "is no file of expert records that this version reads"),
    "parts that are no JSON": (about(parts="[{"), "is no file of expert records that this version reads"),
    "parts without offsets": (change_parts(lambda p: p[0].pop("offset")), "is no file of expert records"),
    "parts that are text": (change_parts(lambda p: p[0].update(nbytes="9")), "is no file of expert records"),
    "no records": (lambda h: h.update(others=h.pop("records")), "is no file of expert records that this version reads"),
    "another layer": (about(layer="0"), "holds other experts than the shards beside it"),
    "another name": (change_parts(lambda p: p[0].update(name="x.weight")), "holds other experts than the shards"),
    "another shape": (change_parts(lambda p: p[0].update(shape=[1, 1])), "holds other experts than the shards"),
    "another dtype": (change_parts(lambda p: p[1].update(dtype="F16")), "holds other experts than the shards"),
    "outside of the record": (change_parts(lambda p: p[-1].update(offset=10**6)), "holds other experts than"),
    "before the record": (change_parts(lambda p: p[-1].update(offset=-64)), "holds other experts than the shards"),
    "another size": (change_parts(lambda p: p[0].update(nbytes=8)), "sizes and shapes of its records contradict"),
    "parts that changed places": (
        change_parts(lambda p: p[0].update(offset=p[1]["offset"]) or p[1].update(offset=0)),
        "was made of other weights than the shards beside it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_records_that_are_not_of_these_shards(packed: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    change, message = HEADERS[name]
    rewrite(folder / "experts/layer-00001.safetensors", change)
    with pytest.raises(CheckpointError, match=f"layer-00001.safe.*{message}.*delete .*experts, .*--pack-experts"):
        layouts_of(folder)


def test_records_of_other_weights(packed: Path, tmp_path: Path) -> None:
    """The same model, trained on: every size agrees."""
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    source = write_checkpoint(tmp_path / "a", CONFIG, random_tensors(CONFIG, seed=1), dtype="bfloat16")
    other = convert(source, tmp_path / "b", bits=4, group_size=32, pack_experts=True)
    for record in (folder / "experts").iterdir():
        shutil.copy(other / "experts" / record.name, record)
    with pytest.raises(CheckpointError, match="was made of other weights"):
        layouts_of(folder)
    shutil.rmtree(folder / "experts")
    assert layouts_of(folder)[0].files == tuple(folder.glob("*.safetensors"))


def test_records_that_are_cut_off(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    record = folder / "experts/layer-00000.safetensors"
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="layer-00000.safetensors.*"):
        layouts_of(folder)
    record.unlink()  # a layer without records is read from the shards
    layouts = layouts_of(folder)
    assert [file.parent.name for layout in layouts.values() for file in layout.files] == ["copy", "experts"]


@pytest.mark.parametrize("kind, write", [("FP8", write_fp8), ("GPTQ", write_gptq)])
def test_what_has_to_be_converted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, write: Callable[..., object]
) -> None:
    """Said before a weight is read, with the command that helps."""
    write(tmp_path / "model", "moe")
    config = read_config(tmp_path / "model").text
    plan = StreamPlan((config.moe.experts_per_token,) * config.num_hidden_layers, 1, 64, 64, 1 << 24, 1 << 30)
    monkeypatch.setattr(load, "read_parts", lambda *given: pytest.fail("a weight is read"))
    with pytest.raises(CheckpointError, match=f"in {kind} cannot be streamed.*mlx-qwen35 convert .*model TARGET"):
        load_model(tmp_path / "model", stream=plan)
