"""What ranks say of themselves before anything is loaded, and how one is noticed that says nothing more."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.errors import ArgumentError, RankLostError
from mlx_qwen35.parallel import wire
from mlx_qwen35.parallel.call import ONE, Call, Past, has_embedded
from mlx_qwen35.parallel.identity import identity
from mlx_qwen35.parallel.meeting import differences
from mlx_qwen35.parallel.place import on_this_machine, place_of
from mlx_qwen35.parallel.ranks import Ranks, _bytes, read_bytes
from mlx_qwen35.parallel.wire import TOLD, Watched, Wire
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conftest import CHECKOUT


def test_every_difference_is_named_with_the_rank() -> None:
    facts = {"mlx": "0.32.4", "checkpoint": "a", "options": {"dtype": "float32", "kv": None}}
    assert differences([facts, dict(facts)], ("mlx", "checkpoint", "options")) is None
    other = {"mlx": "0.33.0", "checkpoint": "a", "options": {"dtype": "float16", "kv": None}}
    said = differences([facts, other, facts], ("mlx", "checkpoint", "options"))
    assert "mlx is '0.32.4' on rank 0, '0.33.0' on rank 1, '0.32.4' on rank 2" in said
    assert "options: dtype is 'float32' on rank 0, 'float16' on rank 1" in said and "checkpoint" not in said


def test_copies_of_a_checkpoint_are_one_and_another_is_not(tmp_path: Path) -> None:
    config = tiny_config("dense")
    tensors = random_tensors(config)
    one = identity(open_source(write_checkpoint(tmp_path / "a", config, tensors)))
    assert identity(open_source(write_checkpoint(tmp_path / "b", config, tensors, shards=3))) == one
    other = random_tensors(config, seed=1)
    assert identity(open_source(write_checkpoint(tmp_path / "c", config, other))) != one


def test_places_are_those_of_the_launcher(tmp_path: Path) -> None:
    assert place_of({}) is None
    made = on_this_machine(3, tmp_path)
    places = [place_of(each) for each in made]
    assert [place.rank for place in places] == [0, 1, 2] and {place.ranks for place in places} == {3}
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:32323"], ["10.0.0.2:32324"]]')
    place = place_of({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)})
    assert (place.rank, place.ranks, place.host, place.port, place.backend) == (1, 2, "10.0.0.1", 36323, "ring")
    devices = tmp_path / "devices.json"
    devices.write_text('[[null, "rdma_en2"], ["rdma_en2", null]]')
    jaccl = {"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "10.0.0.1:5000", "MLX_IBV_DEVICES": str(devices)}
    assert place_of(jaccl).backend == "jaccl" and place_of(jaccl).ranks == 2
    for wrong in ({"MLX_RANK": "2"}, {"MLX_RANK": "x"}):
        with pytest.raises(ArgumentError, match="MLX_RANK"):
            place_of({"MLX_HOSTFILE": str(hosts)} | wrong)
    for broken in ("{", "[]", '[["127.0.0.1"]]', '{"hosts": 3}', '[["127.0.0.1:99999"], ["127.0.0.1:2"]]', "[[], []]"):
        hosts.write_text(broken)
        with pytest.raises(ArgumentError, match="start with mlx.launch"):
            place_of({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"})


def pair() -> tuple[Wire, Wire]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        near = socket.create_connection(door.getsockname())
        return Wire(near), Wire(door.accept()[0])


def test_silence_is_noticed_and_so_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "EVERY", 0.05)
    monkeypatch.setattr(wire, "SILENCE", 0.5)
    lost: list[str] = []
    noticed = threading.Event()

    def on_lost(why: str) -> None:
        lost.append(why)
        noticed.set()

    near, far = pair()
    watched = Watched(near, on_lost, lost.append)
    far.tell(answer=1)
    assert watched.next(5)[0] == TOLD
    assert noticed.wait(20) and "hangs, was stopped, or is unplugged" in lost[0]
    watched.close()

    lost.clear()
    noticed.clear()
    near, far = pair()
    watched = Watched(near, on_lost, lost.append)
    watched.send(wire.BYTES, bytes(1 << 24))  # more than sockets hold: it waits for who reads nothing, and is freed
    assert noticed.is_set() and "hangs" in lost[0]
    watched.close()

    lost.clear()
    noticed.clear()
    near, far = pair()
    watched = Watched(near, on_lost, lost.append)
    far.close()
    assert noticed.wait(20) and "connection" in lost[0]
    watched.close()


def test_rank_0_says_who_is_lost_and_refuses_further_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, (near, far), (second, other) = Ranks(3), pair(), pair()
    ranks.admit(1, near)
    with pytest.raises(ValueError):
        ranks.admit(1, near)
    ranks.admit(2, second)
    ranks.wait_for_all(1)
    ranks.names = ["rank 0", "rank 1 (mini, process 7)", "rank 2"]
    far.close()
    kind, body = other.receive(20)
    assert kind == wire.FAILED and b"rank 1 (mini, process 7) is lost" in body
    with pytest.raises(RankLostError, match="rank 1"), ranks.calling():
        pass
    with pytest.raises(RankLostError, match="rank 1 "):
        Ranks.answers(ranks)
    ranks.close()


def test_an_interrupt_is_one_and_the_others_are_told() -> None:
    ranks, (near, far) = Ranks(2), pair()
    ranks.admit(1, near)
    with pytest.raises(KeyboardInterrupt), ranks.together():
        raise KeyboardInterrupt
    assert far.receive(20) == (wire.FAILED, b"rank 0 was interrupted")
    with pytest.raises(RankLostError, match="rank 0 was interrupted"), ranks.calling():
        pass
    ranks.close()


def test_who_is_not_connected_in_time_is_ended_and_says_whom_it_lacks(tmp_path: Path) -> None:
    """MLX's own wait lets no thread of this process run."""
    environment = {**os.environ, **on_this_machine(2, tmp_path)[0], "MLX_QWEN35_STATUS": str(tmp_path / "status")}
    script = (
        "from mlx_qwen35.parallel import meeting, place, progress\n"
        "meeting.JOINING = 0.5\n"
        "meeting.join(place.place_of(), progress.Progress())\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert "error: rank 1 is lost: MLX has not connected rank 0 within" in done.stderr
    assert (tmp_path / "status").read_text() == "70\n"


def test_a_rank_that_does_not_come_is_named() -> None:
    ranks = Ranks(3)
    with pytest.raises(RankLostError, match="rank 1, 2 did not come within 0 seconds; there are to be 3 ranks"):
        ranks.wait_for_all(0.1)


def test_a_call_is_a_frame_of_small_integers() -> None:
    pasts = [Past(4, True, 9, [0], []), Past(0, False, 10, [2, -3], [0, 5])]
    call = Call(np.array([[1, 2], [3, 4]]), ONE, pasts, True, -1, [7, 8], [11, 12], [5, 6], best=(20, 90))
    again = Call.read(call.frame(), None)
    assert not has_embedded(call.frame()) and call.frame().dtype == np.int32
    assert vars(again) | {"tokens": None} == vars(call) | {"tokens": None}
    assert np.array_equal(again.tokens, call.tokens)
    decoding = Call(np.array([[17]]), ONE, [Past(4, True, 9, [0], [])], False, -1, None, [], [3])
    assert decoding.frame().nbytes < 100
    for array in (mx.arange(6, dtype=mx.bfloat16).reshape(2, 3), mx.array([1, 2], mx.int32)):
        assert mx.array_equal(read_bytes(_bytes(array)), array) and read_bytes(_bytes(array)).dtype == array.dtype
