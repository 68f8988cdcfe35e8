"""`convert`: flags to arguments, and one real conversion that `generate` reads again."""

import json

import pytest

from mlx_qwen35.checkpoint import convert as conversion


@pytest.fixture
def calls(monkeypatch):
    calls = []

    def convert(source, target, **options):
        assert options.pop("on_progress")
        calls.append((source, target, options))
        return target

    monkeypatch.setattr(conversion, "convert", convert)
    return calls


PLAIN = {"bits": None, "group_size": 64, "mode": "affine", "dtype": None, "overwrite": False}


@pytest.mark.parametrize(
    "argv, options",
    [
        ("a b", {}),
        ("--hf-path a --mlx-path b", {}),
        ("a --mlx-path b --overwrite", {"overwrite": True}),
        ("a b -q", {"bits": 4}),
        ("a b --q-bits 6", {"bits": 6}),
        ("a b -q --q-bits 8 --q-group-size 32", {"bits": 8, "group_size": 32}),
        ("a b --q-mode mxfp4", {"bits": 4, "mode": "mxfp4"}),
        ("a b --dtype bfloat16", {"dtype": "bfloat16"}),
    ],
)
def test_flags(calls, run, argv, options):
    done = run("convert", *argv.split())
    assert (done.status, done.out) == (0, "b\n")
    assert calls == [("a", "b", {**PLAIN, **options})]


@pytest.mark.parametrize("argv, says", [("", "SOURCE"), ("a", "TARGET"), ("a b --hf-path c", "--hf-path")])
def test_wrong_paths(calls, run, argv, says):
    done = run("convert", *argv.split())
    assert done.status == 2 and done.err.startswith("error: ") and says in done.err
    assert not calls


def test_a_converted_checkpoint_answers_the_same(checkpoint, run, tmp_path):
    target = tmp_path / "converted"
    assert run("convert", checkpoint, target).status == 0
    ask = ("-p", "hello", "-n", "8", "--json")
    first, second = (json.loads(run("generate", "--model", folder, *ask).out) for folder in (checkpoint, target))
    assert first["text"] == second["text"]
    done = run("convert", checkpoint, target)
    assert done.status == 2 and done.err.count("error: ") == 1
