"""README and docs/GUIDE.md are true: their commands and snippets run as they are written, and what they name is there.

Knows their form: code blocks, inline code, links. SOURCE, NAME and TARGET stand for the demo and what is made of it;
what would install something or run the tests is only looked up. README_ENVIRONMENT names a virtual environment in which
the package was installed as README says; without, the checkout takes its place.
"""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import mlx_qwen35
from mlx_qwen35.cli.main import build_parser
from mlx_qwen35.engine import engine
from tests.conftest import CHECKOUT
from tests.fake_hub import Hub, serving
from tests.library.test_gguf import written
from tests.published import CONFIGS

PAGES = (CHECKOUT / "README.md", CHECKOUT / "docs/GUIDE.md")
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)  # read in this order
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
ABSENT = re.compile(r"flags of mlx-lm\s+are\s+not\s+supported:\s+(.*?)\.\s+`--help`", re.DOTALL)
SECONDS = 120
INSTALLED = os.environ.get("README_ENVIRONMENT")


def commands(text: str = README) -> list[str]:
    """The lines of a page's blocks of commands, and inline code that begins like one."""
    lines = [line for block in INDENTED.findall(text) for line in block.splitlines()]
    inline = (" ".join(code.split()) for code in INLINE.findall(text))
    lines += [code for code in inline if code.split()[0] in ("make", "mlx-qwen35", "pip", "python") and " " in code]
    # A comment may name a command too: pip install .  # on NVIDIA: pip install '.[cuda]'
    parts = [part for line in lines for part in re.split(r"\s+# (?:on \w+: )?", line.strip())[:2]]
    known = (part for part in parts if re.match(r"(make|pip|python|mlx-qwen35|git diff) ?", part))
    return list(dict.fromkeys(" ".join(shlex.split(part, posix=False)) for part in known))


RUN = [command for command in commands() if "mlx-qwen35 " in command or command.startswith("python ")]


def draw(path: Path) -> None:
    picture = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(picture).rectangle((50, 50, 86, 86), fill="blue")
    picture.save(path)


def film(path: Path) -> None:
    av = pytest.importorskip("av", reason="av is not installed: pip install '.[video]'")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for number in range(8):
            frame = np.full((96, 96, 3), 255, np.uint8)
            frame[40:60, 8 * number : 8 * number + 20] = (0, 0, 255)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what README's commands take for granted, in which `run_in` finds mlx-qwen35 installed."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("photo.jpg", "before.png", "shapes.png"):
        draw(folder / name)
    for name in ("clip.mp4", "after.mp4"):
        film(folder / name)
    (folder / "bin").mkdir()
    programs = {"git": "printf '%s\\n' '-a = 1' '+a = 2'"}  # what `git diff` gives is piped in
    if INSTALLED is None:
        programs |= {"python": f'exec {sys.executable} "$@"', "mlx-qwen35": f'exec {sys.executable} -m mlx_qwen35 "$@"'}
    for name, does in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / "bin" / name).chmod(0o755)
    for door in ("generate.py", "convert.py"):
        (folder / door).symlink_to(CHECKOUT / door)
    hub = Hub()
    config = (CONFIGS / "Qwen3.5-27B.json").read_bytes()
    hub.repositories["Qwen/Qwen3.5-27B"] = {"config.json": config, "model.safetensors": b""}
    quantized = written(folder / "uploaded" / "Qwen3.5-9B-Q4_K_M.gguf", blocks="Q4_K")
    hub.publish("unsloth/Qwen3.5-9B-GGUF", quantized.parent)
    with serving(hub) as address:
        (folder / "hub").write_text(address)
        yield folder


def run_in(folder: Path, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    home = {name: str(folder / "home") for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
    variables = {"HF_ENDPOINT": (folder / "hub").read_text(), "NO_PROXY": "127.0.0.1"}
    programs = [str(folder / "bin"), *([f"{INSTALLED}/bin"] if INSTALLED else []), os.environ["PATH"]]
    variables |= {"PATH": os.pathsep.join(programs), "PYTHONPATH": "" if INSTALLED else str(CHECKOUT)}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, **home, **variables}, input=stdin, capture_output=True,
        text=True, timeout=SECONDS,
    )  # fmt: skip


def filled(command: str) -> str:
    """As a reader fills it in; SOURCE and TARGET follow `python convert.py`, whose line is about no checkpoint."""
    if command in ("python convert.py", "python generate.py", "python -m mlx_qwen35"):
        return f"{command} --help"
    model = {"SOURCE": "demo", "NAME": "demo"}
    if "mlx-qwen35 serve" in command:  # at a port that is free, until it says where it is
        waits = "for _ in $(seq 600); do test -s said && break; sleep 0.1; done; cat said; kill $server; wait $server"
        command = f"{command} --port 0 >said & server=$!; {waits}; true"
    return re.sub(r"\b(SOURCE|NAME)\b", lambda word: model[word[0]], command)


@pytest.mark.skipif(os.name != "posix", reason="commands are those of a POSIX shell")
@pytest.mark.parametrize("command", RUN)
def test_commands(place: Path, command: str) -> None:
    if "TARGET" in command and "convert" not in command and not (place / "TARGET").exists():
        assert run_in(place, "mlx-qwen35 convert demo TARGET -q").returncode == 0  # where one test runs alone
    done = run_in(place, filled(command), stdin="What is 17 + 25?\n" if " chat" in command else "")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.strip()
    if "17 + 25" in command or command == "mlx-qwen35 chat":
        assert "42" in done.stdout


def test_every_kind_of_command_is_run() -> None:
    """So that a change of README's form does not leave it untested."""
    words = {command.split("mlx-qwen35 ")[-1].split()[0] for command in RUN if "mlx-qwen35 " in command}
    assert words == {"chat", "generate", "convert", "ls", "doctor", "estimate", "serve", "completion"}
    assert len(RUN) >= 14 and sum("TARGET" in command for command in RUN) >= 6


def test_what_is_made_and_installed_is_there() -> None:
    targets = set(re.findall(r"^(\w+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    project = (CHECKOUT / "pyproject.toml").read_text()
    (extras,) = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)\n\n", project, re.MULTILINE | re.DOTALL)
    made = [command.split()[1] for command in commands() if command.startswith("make ")]
    installed = [command for command in commands() if command.startswith("pip ")]
    assert len(made) >= 4 and set(made) <= targets
    assert len(installed) >= 4
    for command in installed:
        # The package is on no registry: a name in the place of the dot would install nothing, or another's.
        found = re.fullmatch(r"pip install (?:\.|'\.\[(\w+)\]')", command)
        assert found and (not found[1] or re.search(rf"^{found[1]} = \[", extras, re.MULTILINE)), command


def test_snippets(place: Path) -> None:
    """One after the other, as in a notebook; `load` has the demo."""
    snippets = FENCED.findall(README)
    assert len(snippets) >= 3
    code = "\n".join(["import mlx.core as mx", "mx.set_default_device(mx.cpu)", *snippets])
    (place / "snippets.py").write_text(code, encoding="utf-8")
    done = run_in(place, "python snippets.py")
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout and done.stdout.strip() != "42"


def test_flags_are_those_that_there_are() -> None:
    parser = build_parser()
    (subcommands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    known = {flag for command in subcommands.values() for flag in command._option_string_actions} | {"--version"}
    (absent,) = ABSENT.findall(README)
    not_here = set(re.findall(r"`(--[\w-]+)`(?! is)", absent))
    named = {flag for code in INLINE.findall(README) for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", code)}
    assert len(not_here) > 5 and not not_here & known
    assert named - not_here - {"--as-mac"} <= known  # that is pytest's


def test_calls_have_the_arguments_that_there_are() -> None:
    """`load("NAME", memory="24GB")` among inline code; `images=` and others in a paragraph are stream_generate's
    or the engine's."""
    calls, arguments = 0, []
    for code in INLINE.findall(README):
        if re.fullmatch(r"\w+=[^ ]*", code) and not code[0].isupper():
            arguments.append(code.partition("=")[0])
        with_call = re.fullmatch(r"(\w+)\((.*)\)", code, re.DOTALL)
        if not with_call or with_call[1] not in mlx_qwen35.__all__:
            continue
        call = ast.parse(code if not code.endswith("=)") else code[:-1] + "0)", mode="eval").body
        signature = inspect.signature(getattr(mlx_qwen35, with_call[1]))
        signature.bind_partial(*call.args, **{word.arg: None for word in call.keywords})
        calls += 1
    asked = (mlx_qwen35.stream_generate, mlx_qwen35.load, mlx_qwen35.Engine)
    known = {name for function in asked for name in inspect.signature(function).parameters} | {*engine.OPTIONS}
    assert calls >= 5 and len(arguments) >= 8 and set(arguments) <= known, set(arguments) - known


def test_files_are_there() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        linked = [link for link in links if "://" not in link]
        assert len(linked) > 10 and not [link for link in linked if not (page.parent / link).exists()]
