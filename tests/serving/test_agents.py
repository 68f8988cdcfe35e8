"""Coding agents edit a file through the server. The agents, HTTP, interfaces, template and tools are real; what the
model says is a script, spoken in its own words behind the engine's interface.

The agents are taken from the folder that AGENTS names (node_modules/.bin), or from the path:

    npm install --prefix DIR @anthropic-ai/claude-code @openai/codex opencode-ai @qwen-code/qwen-code
    AGENTS=DIR/node_modules/.bin pytest tests/serving/test_agents.py
"""

import json
import os
import shutil
import signal
import subprocess
import threading
from dataclasses import replace

import pytest

from mlx_qwen35.engine.answer import Answer, Channel
from mlx_qwen35.text.messages import check_messages
from mlx_qwen35.text.reply import ReplyParser
from tests.serving import fake
from tests.serving.running import running

SECONDS = 120  # that an agent may take
TASK = "In notes.txt, write 'green' in place of 'red'."


def call(name, **arguments):
    """A call as the model writes it."""
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"I will do that.\n\n<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


class Scripted:
    """Stands where an Engine does. script: what it says, one line for each result of a tool that is there already;
    asked: the (prompt, options) of each request with tools."""

    def __init__(self, processor, script):
        self.processor = replace(processor, context_length=10**6)
        self.script, self.asked, self.running = script, [], 0
        self._lock = threading.Lock()

    def submit(self, prompt, *, tools=(), **options):
        made = self.processor.prompt(
            prompt, tools=tools, enable_thinking=False, reasoning_effort=None, preserve_thinking=None
        )
        names = {tool["function"]["name"] for tool in tools}
        wanted = self.script[0].partition("<function=")[2].partition(">")[0]
        text = "Notes"  # a title, say
        if wanted in names:
            with self._lock:
                self.asked.append((prompt, {"tools": tools, **options}))
            done = sum(message["role"] == "tool" for message in check_messages(prompt))
            text = self.script[min(done, len(self.script) - 1)]
        channel, parser = Channel(len(made.tokens), 1), ReplyParser(thinking=False, tools=tools)
        for at in range(0, len(text), 5):
            channel.put(fake.part(text[at : at + 5], parser.feed(text[at : at + 5])))
        channel.put(fake.part("", parser.finish(), finish="stop"))
        return Answer(channel, self)

    def close(self):
        pass


def program(name):
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("AGENTS", ""), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not installed (npm install it, and name its folder in AGENTS)")
    return found


@pytest.fixture
def place(tmp_path):
    """A home of its own, and a folder with the file."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "work/notes.txt").write_text("The door is red.\n")
    return tmp_path


def edited(place, server, script, command, **environment):
    """Runs an agent to its end -> (what the model was asked, what the agent printed)."""
    loaded = server.pool.places[0].loaded
    engine, loaded.engine = loaded.engine, Scripted(loaded.processor, script)
    own = {"PATH": os.environ["PATH"], "HOME": str(place / "home"), "XDG_CONFIG_HOME": str(place / "home/.config"),
           "XDG_DATA_HOME": str(place / "home/.data"), "XDG_CACHE_HOME": str(place / "home/.cache"),
           "XDG_STATE_HOME": str(place / "home/.state"), "TERM": "dumb", "LANG": "C.UTF-8"}  # fmt: skip
    try:
        agent = subprocess.Popen(
            command, cwd=place / "work", env=own | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = agent.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGKILL)
            printed, _ = agent.communicate(timeout=10)
            pytest.fail(f"it did not end in {SECONDS} s: {printed[-2000:]}")
        asked = loaded.engine.asked
    finally:
        loaded.engine = engine
    text = (place / "work/notes.txt").read_text()
    assert text == "The door is green.\n", printed[-3000:]
    assert agent.returncode == 0, printed[-3000:]
    assert len(asked) >= len(script), printed[-3000:]
    return asked, printed


@pytest.fixture(scope="module")
def server():
    with running("demo") as server:
        yield server


def test_claude_code(place, server):
    claude, file = program("claude"), str(place / "work/notes.txt")
    edit = call("Edit", file_path=file, old_string="red", new_string="green")
    script = [call("Read", file_path=file), edit, "It is green."]
    command = [claude, "-p", TASK, "--allowedTools", "Read,Edit", "--model", "demo"]
    asked, printed = edited(
        place, server, script, command, ANTHROPIC_BASE_URL=server.url, ANTHROPIC_AUTH_TOKEN="local",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1",
    )  # fmt: skip
    assert "It is green." in printed
    assert not any("x-anthropic-billing-header" in json.dumps(prompt) for prompt, _ in asked)


def test_codex(place, server):
    codex = program("codex")
    home = place / "home/codex"
    home.mkdir()
    (home / "config.toml").write_text(
        'model = "demo"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n'
        f'base_url = "{server.url}/v1"\nwire_api = "responses"\n[features]\nmulti_agent = true\n'
    )
    edit, another = call("exec_command", cmd="sed -i s/red/green/ notes.txt"), call("spawn_agent", message="Say hi.")
    script = [edit, another, "It is green."]  # the second is a tool of a namespace
    command = [codex, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK]
    asked, printed = edited(place, server, script, command, CODEX_HOME=str(home))
    assert "It is green." in printed
    results = [m["content"] for prompt, _ in asked for m in prompt if m["role"] == "tool"]
    assert any("agent_id" in str(result) for result in results), results


def test_opencode(place, server):
    opencode, file = program("opencode"), str(place / "work/notes.txt")
    models = {"demo": {"name": "demo", "limit": {"context": 100000, "output": 8000}}}
    options = {"baseURL": f"{server.url}/v1", "apiKey": "x"}
    local = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": models}
    (place / "work/opencode.json").write_text(json.dumps({"provider": {"local": local}, "autoupdate": False}))
    edit = call("edit", filePath=file, oldString="red", newString="green")
    script = [call("read", filePath=file), edit, "It is green."]
    _, printed = edited(place, server, script, [opencode, "run", "-m", "local/demo", TASK])
    assert "It is green." in printed


def test_qwen_code(place, server):
    qwen, file = program("qwen"), str(place / "work/notes.txt")
    script = [call("read_file", file_path=file), call("edit", file_path=file, old_string="red", new_string="green"),
              "It is green."]  # fmt: skip
    _, printed = edited(
        place, server, script, [qwen, "-p", TASK, "--yolo", "--auth-type", "openai"],
        OPENAI_BASE_URL=f"{server.url}/v1", OPENAI_API_KEY="x", OPENAI_MODEL="demo",
    )  # fmt: skip
    assert "It is green." in printed
