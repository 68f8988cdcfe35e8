"""Sessions on disk: bit for bit, or refused with the reason; and whatever ends a save, a whole file is left."""

import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import chat_script
from mlx_qwen35 import Sampling, load
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.conversion.write import SafetensorsFile
from mlx_qwen35.errors import CheckpointError, SessionError
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.session import Session, load_session
from mlx_qwen35.text.template import ChatTemplate
from tests.conftest import CHECKOUT
from tests.drafted import guessed
from tests.seeing_model import seeing_model, some_media

from .test_properties import fed

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
GREEDY = {"max_tokens": 12, "sampling": Sampling()}
SAY_MORE = """
import sys
from tests.session.test_saving import go_on
print(go_on(sys.argv[1]))
"""
KILLED = """
import os, sys
from mlx_qwen35.conversion.write import SafetensorsFile
from mlx_qwen35.session import load_session
from tests.seeing_model import seeing_model
model, _ = seeing_model()
session = load_session(sys.argv[1], model)
session.notes = "new"
where, count = sys.argv[2], int(sys.argv[3])
method = getattr(SafetensorsFile, where)
def killed(self, *given):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), 9)
    return method(self, *given)
setattr(SafetensorsFile, where, killed)
session.save(sys.argv[1])
"""


def python(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


def begin(messages=ASKED, form: KVFormat | None = None) -> tuple[Session, list]:
    """A session of the demo about a picture, and the messages with its answer."""
    model, processor = load(mtp=True)
    model.kv_form = form
    session, images = Session(model, processor), [chat_script.picture(3)]
    parts = list(stream_generate(model, processor, messages, images=images, session=session, **GREEDY))
    return session, [*messages, {"role": "assistant", "content": "".join(part.content for part in parts)}]


def hear(session: Session, messages: list) -> str:
    """What it says next, the bits of the logits it says it from, and what was guessed before."""
    prompt = [*messages, {"role": "user", "content": "Where is it?"}]
    digest, images = hashlib.sha256(), [chat_script.picture(3)]
    stream = stream_generate(session.model, session.processor, prompt, images=images, session=session, **GREEDY)
    with guessed(2) as guesses:
        for part in stream:
            digest.update(np.array(part.logprobs).tobytes())
            token, kept = part.token, part.cached_tokens
    assert kept > 8 and len(guesses) > 3
    return f"{kept} {token} {session.tokens[-12:]} {digest.hexdigest()} {guesses}"


def go_on(path: str) -> str:
    form, messages = json.loads(Path(path).with_suffix(".json").read_text())
    model, processor = load(mtp=True)
    model.kv_form = KVFormat(*form) if form else None
    session = load_session(path, model, processor)
    return hear(session, messages)


@pytest.mark.parametrize("form", [None, pytest.param((8, 32, 5), marks=pytest.mark.soak)])
def test_a_new_process_goes_on_bit_for_bit(tmp_path, form):
    session, messages = begin(form=KVFormat(*form) if form else None)
    branch = session.branch()
    path = tmp_path / "a.session"
    for kept in (session, branch):  # the first has a stretch of keys that both share by then
        kept.save(path)
        path.with_suffix(".json").write_text(json.dumps([form, messages]))
        done = python(SAY_MORE, path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == hear(kept, messages)


@pytest.fixture(scope="module")
def model():
    return seeing_model()[0]


@pytest.fixture
def saved(model, tmp_path):
    session = Session(model)
    fed(session, 3, some_media("image", 4, 6, seed=1), 300)
    session.notes = {"said": ["a", some_media("video", 2, 4, 4, seed=2)]}
    session.save(tmp_path / "b.session")
    return session, tmp_path / "b.session"


def test_all_of_it_comes_back(saved, model):
    session, path = saved
    again = load_session(path, model)
    assert (again.tokens, again.cache.rope_delta) == (session.tokens, session.cache.rope_delta)
    assert [(m.offset, m.met) for m in again.marks] == [(m.offset, m.met) for m in session.marks]
    for one, other in zip(again.marks, session.marks, strict=True):
        assert one.snapshot.rope_delta == other.snapshot.rope_delta
        for a, b in zip(one.snapshot.delta, other.snapshot.delta, strict=True):
            assert (a is None) == (b is None)
            for x, y in zip(a or (), b or (), strict=True):
                np.testing.assert_array_equal(np.array(x), np.array(y))
    assert [(start, m.key) for start, m in again.shown] == [(start, m.key) for start, m in session.shown]
    assert again.notes["said"][1].key == session.notes["said"][1].key
    again.save(path.with_name("c.session"))
    assert path.with_name("c.session").read_bytes() == path.read_bytes()
    assert fed(again, 3, some_media("image", 4, 6, seed=1), 300, 5) == len(session.tokens)


def test_every_damage_is_refused(saved, model):
    _, path = saved
    whole, rng = path.read_bytes(), random.Random(0)
    header = int.from_bytes(whole[:8], "little") + 8
    places = [*range(0, 12), *rng.sample(range(12, header), 60), *rng.sample(range(header, len(whole)), 60)]
    for at in [*places, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(SessionError, match=str(path)):
            load_session(path, model)
    for length in (0, 7, 100, header, len(whole) - 1, *rng.sample(range(len(whole)), 20)):
        path.write_bytes(whole[:length])
        with pytest.raises(SessionError, match="[Dd]elete it"):
            load_session(path, model)
    path.write_bytes(whole + b"0")
    with pytest.raises(SessionError, match="1 bytes after"):
        load_session(path, model)
    name = whole.index(b"fingerprint") + 40  # inside the first value of it
    path.write_bytes(whole[:name] + bytes([whole[name] ^ 1]) + whole[name + 1 :])
    with pytest.raises(SessionError, match="is damaged"):
        load_session(path, model)
    path.write_bytes(whole)
    load_session(path, model)


def test_what_belongs_to_another_is_refused(saved, model, tmp_path):
    _, path = saved

    def refused(other, words, processor=None, path=path):
        with pytest.raises(SessionError, match=f"saved with other {words}\\. Load what"):
            load_session(path, other, processor)

    refused(seeing_model(seed=1)[0], "weights")
    refused(seeing_model(num_key_value_heads=2)[0], "config.json, quantization, weights")
    refused(seeing_model(rope_parameters={"rope_theta": 1000})[0], "config.json, positions")
    model.kv_form = KVFormat(8, 32)
    refused(model, "kv_bits")
    model.kv_form = None
    changed = seeing_model()[0]
    changed.set_dtype(mx.float16)
    refused(changed, "quantization, weights")
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(3)})
    with pytest.raises(SessionError, match="no session of this package"):
        load_session(tmp_path / "weights.safetensors", model)
    with pytest.raises(SessionError, match="does not exist"):
        load_session(tmp_path / "nothing", model)


def test_another_template_is_refused(tmp_path):
    model, processor = load()
    session = Session(model, processor)
    list(stream_generate(model, processor, "Hello!", session=session, **GREEDY))
    session.save(tmp_path / "a")
    other = replace(processor, template=ChatTemplate(processor.template.source + " "))
    with pytest.raises(SessionError, match="other chat template"):
        load_session(tmp_path / "a", model, other)
    load_session(tmp_path / "a", model, load()[1])


def test_a_save_that_fails_anywhere_leaves_the_old_file(saved, model, monkeypatch):
    session, path = saved
    before, write = path.read_bytes(), SafetensorsFile.write
    count = sum(1 for _ in load_session(path, model).cache.arrays())
    session.notes = "new"
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        for stop in range(count):
            left = stop

            def stopped(self, *given, error=error):
                nonlocal left
                left -= 1
                if left < 0:
                    raise error
                return write(self, *given)

            with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError)):
                patch.setattr(SafetensorsFile, "write", stopped)
                session.save(path)
            assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]
    session.save(path)
    assert load_session(path, model).notes == "new"


@pytest.mark.parametrize("where, count", [("write", 3), ("sync", 0)])
def test_killed_while_saving_the_old_file_is_whole(saved, model, where, count):
    session, path = saved
    before = path.read_bytes()
    done = python(KILLED, path, where, count)
    assert done.returncode == -9, done.stderr
    assert path.read_bytes() == before
    assert len([*path.parent.iterdir()]) == 2  # what it had begun lies beside it ...
    session.save(path)
    assert [*path.parent.iterdir()] == [path]  # ... until the next save


def test_a_folder_that_is_not_there_is_named(saved):
    session, path = saved
    with pytest.raises(CheckpointError, match="cannot be written"):
        session.save(path / "beneath" / "a")


def test_what_is_no_file_is_not_replaced(saved, tmp_path):
    session, _ = saved
    for place in (tmp_path, Path("/"), Path("/dev/null")):
        with pytest.raises(CheckpointError, match="is no file"):
            session.save(place)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no file"):
        session.save(tmp_path / "pipe")


def test_a_link_leads_to_the_file(saved, model, tmp_path):
    session, path = saved
    (tmp_path / "link").symlink_to(path)
    session.notes = "new"
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_session(path, model).notes == "new"


def test_what_is_of_others_or_was_not_read_may_be_whole(saved, model, tmp_path, monkeypatch):
    _, path = saved
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(3)}, {"format": "mx"})
    newer = path.read_bytes().replace(b'"version":"1"', b'"version":"2"')
    (tmp_path / "newer").write_bytes(newer)
    refusals = {"weights.safetensors": "no session of this package", "newer": "version '2'", "none": "does not exist"}
    for name, words in refusals.items():
        with pytest.raises(SessionError, match=words) as refused:
            load_session(tmp_path / name, model)
        assert "elete" not in str(refused.value) and "damaged" not in str(refused.value)

    def failing(*given):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(SessionError, match="Input/output error.*check the disk$"):
        patch.setattr(os, "preadv", failing)
        load_session(path, model)
    with pytest.raises(SessionError, match="check the path and its permissions$"):
        load_session(tmp_path, model)
