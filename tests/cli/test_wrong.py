"""What is said of wrong flags, commands in wrong spellings, and flags in wrong places."""

import re

import pytest

from mlx_qwen35.cli.demo import DEMO_HINT
from mlx_qwen35.cli.main import build_parser, main
from mlx_qwen35.cli.wrong import _COMMANDS, _NAMES
from tests.conftest import CHECKOUT


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    out, err = capsys.readouterr()
    line, _, rest = err.partition("\n")
    assert not out and line.startswith("error: ") and re.fullmatch("`mlx-qwen35.* --help` lists .*\n", rest)
    return line


@pytest.mark.parametrize(
    "argv, says",
    [
        ("generate --max-token 5", "did you mean --max-tokens?"),
        ("generate --temprature 1", "did you mean --temperature?"),
        ("chat --top_p 0.9", "write --top-p"),
        ("chat --Model x", "write --model"),
        ("generate -model x", "write --model"),
        ("generate --ctx-size 100", "here it is --context-length N"),
        ("generate --max-kv-size=100", "here it is --context-length N"),
        ("serve --draft-model x", "is no flag of `mlx-qwen35 serve`, but of generate, chat and estimate"),
        ("generate --response-format x", "here it is --json-schema FILE"),
        ("generate --guided-regex x", "here it is --regex PATTERN"),
        ("chat --n-predict 9", "here it is --max-tokens N"),
        ("chat -ngl 99", "not needed: MLX computes all layers on the GPU"),
        ("chat -md x", "here it is --draft-model NAME"),
        ("generate --trust-remote-code", "not needed"),
        ("convert a b --q-bit 4", "did you mean --q-bits"),
        ("convert a b --bits 4", "here it is --q-bits N"),
        ("convert a -o b", "here it is --mlx-path TARGET"),
        ("estimate --ram 24GB", "here it is --memory SIZE"),
        ("ls --jsn", "did you mean --json?"),
        ("generate --zzz --max-token 5", "--zzz is no flag of `mlx-qwen35 generate`; --max-token is"),
        ("generate hello there", "a prompt is given as -p 'hello there'"),
        ("chat Qwen/Qwen3.5-4B", "a model is given as --model Qwen/Qwen3.5-4B"),
        ("convert a b c", "'c' is one more than there is a place for"),
        ("generate -p", "expected one argument"),
        ("generate --top-k many -p hi", "--top-k: invalid int value: 'many'"),
    ],
)  # fmt: skip
def test_flags(capsys: pytest.CaptureFixture[str], argv: str, says: str) -> None:
    assert says in refusal(capsys, *argv.split())


@pytest.mark.parametrize(
    "argv, says",
    [
        (["generat", "-p", "hi"], "did you mean `mlx-qwen35 generate -p hi`?"),
        (["Chat"], "did you mean `mlx-qwen35 chat`?"),
        (["chta"], "did you mean `mlx-qwen35 chat`?"),
        (["list"], "did you mean `mlx-qwen35 ls`?"),
        (["run", "Qwen/Qwen3.5-4B"], "did you mean `mlx-qwen35 chat --model Qwen/Qwen3.5-4B`?"),
        (["What is 17 + 25?"], "is asked by `mlx-qwen35 generate -p 'What is 17 + 25?'`"),
        (["nonsense"], "'nonsense' is no command; there are generate, chat, serve, convert, ls, estimate"),
        (["--model", "x", "generate", "-p", "hi"], "its flags: `mlx-qwen35 generate --model x -p hi`"),
        (["--temp", "0", "-p", "hi there"], "its flags: `mlx-qwen35 generate --temp 0 -p 'hi there'`"),
        (["--verson"], "did you mean --version?"),
    ],
)
def test_commands(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in refusal(capsys, *argv)


def test_what_others_call_it_is_here_under_the_name_that_is_told() -> None:
    (commands,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    flags = {flag for command in commands.values() for flag in command._option_string_actions}
    assert set(_NAMES.values()) <= flags
    assert set(_COMMANDS) <= set(commands)


def test_no_command_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2 and "commands:" in capsys.readouterr().err
    for argv in (["help", "chat"], ["chat", "--help"], ["help"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.startswith("usage: mlx-qwen35 " + ("chat" if "chat" in argv else "[-h]"))
        assert "Sort these words: queen, jacket, violin" in said


def test_what_to_ask_the_demo_is_said_everywhere(capsys: pytest.CaptureFixture[str], run) -> None:
    assert DEMO_HINT in run("generate", "-p", "What is 17 + 25?", "--temp", "0").err
    readme = " ".join((CHECKOUT / "README.md").read_text().split())
    assert all(question in readme for question in re.findall('"(.*?)"', DEMO_HINT))
