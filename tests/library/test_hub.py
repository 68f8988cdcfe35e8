"""Downloads, from a Hub on this machine: what is fetched, watched, cancelled, gone on with, refused."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

import mlx_qwen35
from mlx_qwen35.cli.main import main
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import find, hub_cache, hub_progress
from mlx_qwen35.library import hub as downloads
from tests.fake_hub import Hub
from tests.machine import COMMIT, Machine, checkpoint, foreign
from tests.text.folders import write_text_files

NAME = "Qwen/Qwen3.5-tiny"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture
def published(machine: Machine, hub: Hub) -> Path:
    """What the Hub has as NAME."""
    folder = write_text_files(checkpoint(machine.home / "published", shards=3, text={"vocab_size": 320}))
    (folder / "README.md").write_text("Qwen")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"another")
    (folder / "mtp").mkdir()
    (folder / "mtp" / "weights.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    hub.publish(NAME, folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def bytes_in(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and not path.is_symlink())


def test_a_download(machine: Machine, hub: Hub, published: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = find(NAME, on_progress=lambda *at: seen.append(at))
    assert folder == hub_cache.snapshot(NAME) and folder.name == COMMIT
    assert files(folder) == files(published) - {"README.md", "picture.png", "onnx/model.safetensors"}
    assert all((folder / name).read_bytes() == (published / name).read_bytes() for name in files(folder))
    total = sum((folder / name).stat().st_size for name in files(folder))
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    # small files first, the shards last: one that has them lacks nothing
    assert hub.gets[-4:] == ["mtp/weights.safetensors", *SHARDS]
    hub.gets.clear()
    assert find(NAME) == folder and hub.gets == []
    machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find(NAME) == folder


def test_load_downloads_and_says_how_far_it_is(hub: Hub, published: Path) -> None:
    seen: list[tuple[int, int]] = []
    model, processor = mlx_qwen35.load(NAME, on_progress=lambda *at: seen.append(at))
    assert model.config == processor.config
    (download, weights) = [at for at in seen if at[0] == 0]
    assert seen.index(download) == 0 and (download[1], download[1]) in seen
    assert seen[-1] == (weights[1], weights[1]) and weights[1] < download[1]


def test_generate_downloads(hub: Hub, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", NAME, "-p", "hi", "-n", "3"]) == 0
    assert "Downloading: " in capsys.readouterr().err
    assert main(["generate", "--model", NAME.lower(), "-p", "hi", "-n", "3"]) == 0
    assert "Downloading" not in capsys.readouterr().err
    assert main(["generate", "--model", "Qwen/Qwen3.5-tinier", "-p", "hi"]) == 2
    assert "Did you mean Qwen/Qwen3.5-tiny?" in capsys.readouterr().err


def test_interrupted_and_gone_on_with(machine: Machine, hub: Hub, published: Path) -> None:
    class Enough(Exception):
        pass

    def until_the_second_shard(done: int, total: int) -> None:
        if hub.gets and hub.gets[-1] == SHARDS[1]:
            raise Enough

    with pytest.raises(Enough):
        find(NAME, on_progress=until_the_second_shard)
    snapshot = hub_cache.snapshot(NAME)
    assert SHARDS[0] in files(snapshot) and not {SHARDS[1], SHARDS[2]} & files(snapshot)
    with pytest.raises(CheckpointError, match="2 of 3 shards that are not there"):
        mlx_qwen35.load_model(snapshot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CheckpointError, match=f"{SHARDS[1]}, {SHARDS[2]} are missing, and HF_HUB_OFFLINE"):
            find(NAME)
    hub.gets.clear()
    folder = find(NAME)
    assert [name for name in hub.gets if not name.endswith(".json")] == SHARDS[1:]
    mlx_qwen35.load_model(folder)


def test_ctrl_c(hub: Hub, published: Path) -> None:
    def press(done: int, total: int) -> None:
        if hub.gets and hub.gets[-1] == SHARDS[0]:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        find(NAME, on_progress=press)
    assert not set(SHARDS) & files(hub_cache.snapshot(NAME))


def test_a_connection_that_breaks(machine: Machine, hub: Hub, published: Path) -> None:
    machine.monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cut = {SHARDS[1]: 100}
    try:  # as its version will: it tries again by itself, or gives up
        folder = find(NAME)
    except CheckpointError as error:
        assert "cannot be downloaded" in str(error)
        folder = find(NAME)
    assert (folder / SHARDS[1]).read_bytes() == (published / SHARDS[1]).read_bytes()


def test_what_is_raised_in_another_thread_reaches_the_caller(machine: Machine) -> None:
    """Where the downloader reports from threads of its own, which swallow what a callback raises."""
    import threading

    def refuse(done: int, total: int) -> None:
        if done:
            raise ValueError("enough")

    watch = hub_progress.Watch(10, refuse)
    interrupts: list[None] = []
    machine.monkeypatch.setattr(hub_progress._thread, "interrupt_main", lambda: interrupts.append(None))
    bar = watch.bar(total=10, desc="x", unit_scale=True)

    def report() -> None:
        with bar:
            bar.update(3)
            bar.set_postfix_str("1 MB/s", refresh=False)
            bar.update(3)

    thread = threading.Thread(target=report)
    thread.start()
    thread.join()
    assert interrupts == [None]
    assert str(watch.raised) == "enough"


def test_bytes_that_are_fetched_and_put_together_count_once() -> None:
    """The Hub's newer storage reports both."""
    reporting = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting", reason="an older huggingface_hub")
    if not hasattr(reporting, "XetDownloadProgressReporter"):
        pytest.skip("this huggingface_hub reports otherwise")
    seen: list[int] = []
    watch = hub_progress.Watch(100, lambda done, total: seen.append(done))
    options = {"reconstruction_desc": "a", "total": 100, "log_level": 20, "name": "a", "tqdm_class": watch.bar}
    with reporting.XetDownloadProgressReporter(**options) as progress:
        for done in (30, 100):
            progress.update_progress(
                SimpleNamespace(
                    total_bytes=100,
                    total_bytes_completed=done,
                    total_transfer_bytes_completed=done,
                    total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completion_rate=1.0,
                )  # fmt: skip
            )
    assert seen == [0, 30, 100]


def test_a_revision(hub: Hub, published: Path) -> None:
    assert find(f"{NAME}@{COMMIT}").name == COMMIT
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        find(f"{NAME}@v9")


def test_refusals_before_anything_is_written(machine: Machine, hub: Hub, published: Path) -> None:
    hub.publish("meta/Llama-3", foreign(machine.home / "llama"))
    hub.repositories["me/Qwen3.5-GGUF"] = {"model-Q4.gguf": b"GGUF"}
    hub.repositories["me/Qwen3.5-bin"] = {"config.json": hub.repositories[NAME]["config.json"], "a.bin": b""}
    hub.repositories["me/Qwen3.5-odd"] = {"config.json": b"[}"}
    hub.repositories["me/secret"] = {}
    hub.gated.add("me/secret")
    machine.cached("Qwen/Qwen3.5-tiniest")
    before = bytes_in(hub_cache.cache_folder())
    for name, said in {
        "meta/Llama-3": "config.json of meta/Llama-3 on the Hugging Face Hub: model_type is 'llama'",
        "me/Qwen3.5-GGUF": "model-Q4.gguf ends early or is damaged",
        "me/Qwen3.5-bin": "holds no model\\*.safetensors",
        "me/Qwen3.5-odd": "is not valid JSON",
        "me/secret": "is gated: accept its terms",
        "Qwen/Qwen3.5-tinier": "neither on this machine nor on the Hugging Face Hub.*Did you mean Qwen/Qwen3.5-tiniest",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            find(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=10)))
        with pytest.raises(CheckpointError, match="0.0 GB free and the download of Qwen/Qwen3.5-tiny needs 0.0 GB"):
            find(NAME)
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
            find(NAME)
    assert bytes_in(hub_cache.cache_folder()) == before


def test_no_network(machine: Machine) -> None:
    machine.monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be downloaded .*: check the network.* there is none"):
        find(NAME)


def test_an_upload_that_is_not_complete(hub: Hub, published: Path) -> None:
    del hub.repositories[NAME][SHARDS[2]]
    with pytest.raises(CheckpointError, match=f"lacks {SHARDS[2]}, which its .* names"):
        find(NAME)


def test_a_single_file(machine: Machine, hub: Hub) -> None:
    folder = checkpoint(machine.home / "single")
    (folder / "generation_config.json").write_text(json.dumps({}))
    hub.publish("me/Qwen3.5-single", folder)
    assert files(find("me/Qwen3.5-single")) == {"config.json", "generation_config.json", "model.safetensors"}
