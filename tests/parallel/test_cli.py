"""The command line with a model on ranks; and what is said of Macs that are not there."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35.checkpoint.load import read_config
from mlx_qwen35.cli.main import main
from mlx_qwen35.library.finding import find
from mlx_qwen35.machine.system import said
from tests.conftest import CHECKOUT

from .test_adapted import written

ASKED = ["-p", "What is 17 + 25?", "--memory", "2GB", "--temperature", "0", "-n", "12"]


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mlx_qwen35", *arguments]
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )


def test_generate_on_two_ranks_answers_as_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a small model that drafts on rank 0 alone, and an adapter that each has a share of."""
    pytest.importorskip("mlx_lm.tuner.lora", reason="mlx-lm is not installed")
    status = tmp_path / "status"
    adapter = written(tmp_path / "adapter", read_config(find("demo")), "lora")
    asked = [*ASKED, "--draft-model", "demo", "--adapter-path", str(adapter), "--stats"]
    done = cli("generate", *asked, "--ranks", "2", "--plan", "experts", "-v", MLX_QWEN35_STATUS=str(status))
    assert done.returncode == 0, done.stderr
    assert "rank 1: experts 8 to 15" in done.stderr and "modelled" in done.stderr
    assert "tokens accepted" in done.stderr
    assert status.read_text() == "0\n"
    assert main(["generate", *asked]) == 0
    assert done.stdout == capsys.readouterr().out
    assert main(["generate", *ASKED]) == 0
    assert done.stdout != capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--plan", "experts"], "add --ranks"),
        (["--ranks", "0"], "must be 1 or more"),
        (["--ranks", "99"], "99 ranks cannot have this model (experts: it has 16 experts; pipeline: it has 8 layers"),
        (["--ranks", "9", "--plan", "pipeline"], "it has 8 layers"),
        (["--ranks", "2", "--adapter-path", "x"], "x has no adapter_config.json"),
    ],
)
def test_flags_that_make_no_sense(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *ASKED, *arguments]) == 2
    assert why in capsys.readouterr().err


def test_estimate_for_macs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--hosts", "8GB,16GB", "--link", "10gbe"]) == 0
    out = capsys.readouterr().out
    assert "demo on 2 Macs over 10 Gbit Ethernet" in out and "Modelled, not measured" in out and "rank 1, 16GB" in out
    assert main(["estimate", "--hosts", "8GB,8GB,8GB", "--plan", "experts", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["plan"]["kind"] == "experts" and made["modelled"] and len(made["plan"]["shares"]) == 3
    assert main(["estimate", "--hosts", "8GB"]) == 2 and main(["estimate", "--hosts", "8GB,8GB", "--link", "x"]) == 2
    assert main(["estimate", "--hosts", "8GB,8GB,8GB", "--plan", "tensor"]) == 2
    assert "3 ranks do not divide" in capsys.readouterr().err


@pytest.mark.soak
def test_a_launched_group_and_its_status(tmp_path: Path) -> None:
    launch = Path(sys.executable).parent / "mlx.launch"
    status, script = tmp_path / "status", tmp_path / "run"
    script.write_text(f'#!/bin/sh\ncd {CHECKOUT}; exec {sys.executable} -m mlx_qwen35 "$@"\n')
    script.chmod(0o755)
    port = 30000 + os.getpid() % 5000
    start = [str(launch), "-n", "2", "--backend", "ring", "--starting-port", str(port), "--env",
             f"MLX_QWEN35_STATUS={status}", "--", str(script), "generate", *ASKED]  # fmt: skip
    done = subprocess.run(start, cwd=CHECKOUT, capture_output=True, text=True, timeout=240)
    assert "7+5=12" in done.stdout and status.read_text() == "0\n"
    done = subprocess.run([*start, "--top-p", "7"], cwd=CHECKOUT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and status.read_text() == "2\n"  # mlx.launch says nothing


def ask(port: int) -> tuple[int, Any]:
    body = {"model": "demo", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]
    except OSError as error:
        return 0, str(error)


@pytest.mark.soak
def test_a_server_that_loses_a_rank_answers_503_and_comes_back(tmp_path: Path) -> None:
    port = 36000 + os.getpid() % 5000
    command = [sys.executable, "-m", "mlx_qwen35", "serve", "--ranks", "2", "--memory", "3GB", "--port", str(port)]
    seen: list[tuple[int, Any]] = []
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=log)
    try:
        for lost in (False, True):
            until = time.monotonic() + 120
            while time.monotonic() < until and (answer := ask(port))[0] != 200:
                seen.append(answer)
                time.sleep(0.2)
            assert answer == (200, "42"), (tmp_path / "log").read_text()
            if not lost:
                (worker,) = said("ps", "-o", "pid=", "--ppid", str(server.pid)).split()
                follower = said("ps", "-o", "pid=", "--ppid", worker).split()[0]
                os.kill(int(follower), signal.SIGKILL)
                seen.clear()
        assert {status for status, _ in seen} <= {503, 0} and any("rank 1" in str(why) for _, why in seen)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
