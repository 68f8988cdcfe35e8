"""The flags for an answer's form: what they ask of the grammar, and errors before weights are read."""

import json
import re

import pytest

from mlx_qwen35 import generation, library

SCHEMA = {"type": "object", "properties": {"type": {"enum": ["text"]}}, "required": ["type"]}
SCHEMA["additionalProperties"] = False


@pytest.fixture
def asked(run, monkeypatch):
    """asked(flags) -> the answer of the demo, and the form that was asked for."""
    forms, stream = [], generation.stream_generate
    monkeypatch.setattr(
        generation, "stream_generate", lambda *a, **k: forms.append(k["response_format"]) or stream(*a, **k)
    )

    def asked(*flags):
        done = run("generate", "-p", "What is 17 + 25?", "--think", "--hide-thinking", "-n", 80, *flags)
        assert done.status == 0, done.err
        return done.out.strip(), forms[-1]

    return asked


def test_a_schema_from_a_file_and_as_text(asked, tmp_path):
    file = tmp_path / "schema"
    file.write_text(json.dumps(SCHEMA))
    for given in (file, json.dumps(SCHEMA)):
        answer, form = asked("--json-schema", given)
        assert json.loads(answer) == {"type": "text"}
        assert form == {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    answer, _ = asked("--json-schema", json.dumps(SCHEMA), "--json")
    assert json.loads(json.loads(answer)["content"]) == {"type": "text"}


def test_an_expression_and_grammars(asked, tmp_path):
    answer, form = asked("--regex", "[a-c]{5}")
    assert re.fullmatch("[a-c]{5}", answer) and form == {"type": "regex", "pattern": "[a-c]{5}"}
    for name, kind, text in (("g.GBNF", "gbnf", 'root ::= "yes" | "no"'), ("g.lark", "grammar", 'start: "yes" | "no"')):
        file = tmp_path / name
        file.write_text(text)
        answer, form = asked("--grammar", file)
        assert answer in ("yes", "no") and form == {"type": kind, "grammar": text}
    assert asked() == ("42", None)


WRONG = [
    ("--json-schema", "no/such/file", "no/such/file cannot be read"),
    ("--json-schema", '{"type"', "--json-schema: the text is not valid JSON"),
    ("--json-schema", '{"not": {}}', "--json-schema: .*'not' is not supported"),
    ("--json-schema", ("s.json", b"[1]"), "--json-schema: "),
    ("--json-schema", ("s.json", b"{"), "s.json is not valid JSON"),
    ("--regex", "(", r"--regex: '\(' is no regular expression"),
    ("--regex", "", "--regex: .*no pattern"),
    ("--grammar", "no/such/file", "no/such/file cannot be read"),
    ("--grammar", ("g.gbnf", b'root ::= "yes" | no'), "--grammar: .*there is no rule 'no'"),
    ("--grammar", ("g.lark", b""), "--grammar: .*no grammar"),
    ("--grammar", ("g.lark", b"\xff"), "g.lark is not text in UTF-8"),
]


@pytest.mark.parametrize("flag, value, says", WRONG)
def test_what_is_no_form_is_refused_before_a_model_is_looked_for(run, monkeypatch, tmp_path, flag, value, says):
    monkeypatch.setattr(library, "find", lambda *a, **k: pytest.fail("a model is looked for"))
    if isinstance(value, tuple):
        name, data = value
        value = tmp_path / name
        value.write_bytes(data)
    done = run("generate", "-p", "hi", flag, value)
    assert re.search(f"^error: .*{says}", done.err) and done.err.count("\n") == 1 and (done.status, done.out) == (2, "")


def test_a_grammar_that_llguidance_refuses_is_refused_before_weights_are_read(run, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "load_held", lambda *a, **k: pytest.fail("weights are read"))
    file = tmp_path / "g.lark"
    file.write_text('start: "yes" | no')
    done = run("generate", "-p", "hi", "--grammar", file)
    assert done.err.splitlines()[-1].startswith("error: the form of the answer cannot be followed: ")
    assert (done.status, done.out) == (2, "")


def test_only_one_form(run):
    with pytest.raises(SystemExit) as left:
        run("generate", "-p", "hi", "--regex", "a", "--json-schema", "{}")
    assert left.value.code == 2
