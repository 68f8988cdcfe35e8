"""Chat templates: what they see, where they are found, and those that are broken."""

import json
from datetime import datetime

import pytest

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.text.template import ChatTemplate
from tests.text import folders

HELLO = [{"role": "user", "content": "Hello"}]


def render(source, messages=HELLO, **given):
    return ChatTemplate(source).render(messages, **given)


# What a template sees


def test_blocks_leave_no_lines_behind():
    assert render("a\n    {% if messages %}\nb\n    {% endif %}\nc") == "a\nb\nc"


def test_variables():
    assert render("{{ messages[0].content }} {{ add_generation_prompt }} {{ tools }}") == "Hello True None"
    assert render("{{ x }}", x=5) == "5"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"


def test_enable_thinking_is_undefined_unless_given():
    source = "{{ enable_thinking is defined }} {{ enable_thinking }}"
    assert render(source) == "False "
    assert render(source, enable_thinking=False) == "True False"


def test_no_tools_and_an_empty_list_are_the_same():
    assert render("{{ tools is none }}", tools=[]) == "True"


def test_tojson_is_plain_json():
    text = {"b": "<é & 'x'>", "a": [1, None]}
    assert render("{{ x | tojson }}", x=text) == json.dumps(text, ensure_ascii=False)
    assert render("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}'


def test_loop_controls_and_training_marks():
    assert render("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aHellob"


def test_the_date():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_tool_use_template_is_taken_with_tools():
    named = {"default": "plain", "tool_use": "tools"}
    assert render(named) == "plain"
    assert render(named, tools=[{"name": "f"}]) == "tools"


# Templates and messages that do not get along


def test_a_refusal_is_told_in_the_templates_words():
    with pytest.raises(PromptError, match="refuses these messages: No tools here"):
        render("{{ raise_exception('No tools here') }}")


@pytest.mark.parametrize("source", ["{{ messages[0].x.y }}", "{{ 1 // 0 }}", "{{ 'a' + 1 }}", "{{ x() }}"])
def test_a_template_that_fails(source):
    with pytest.raises(PromptError, match="fails on these messages"):
        render(source)


@pytest.mark.parametrize("source", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_is_in_a_sandbox(source):
    with pytest.raises(PromptError, match="SecurityError"):
        render(source)


@pytest.mark.parametrize("source", ["{% if %}", "a\n{{ x | nofilter }}", "{% for x in y %}", "{{" + "(" * 5000])
def test_a_template_that_does_not_compile(source):
    with pytest.raises(CheckpointError, match=r"my\.jinja: the chat template"):
        ChatTemplate(source, where="my.jinja")


# Where it is found


def test_jinja_file_goes_before_json_before_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config {{ eos_token }}", "eos_token": "<e>"}')
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "config <e>"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "jinja"


def test_named_templates_in_the_config(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config = {"chat_template": named, "eos_token": {"content": "<e>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert (template.render(HELLO), template.render(HELLO, tools=[{}])) == ("a", "b")


@pytest.mark.parametrize("found", [5, [5], [{"name": "default"}], [{"name": "rag", "template": "x"}],
                                   [{"name": "default", "template": 5}], [], {}])  # fmt: skip
def test_a_config_whose_template_is_none(tmp_path, found):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*template"):
        ChatTemplate.from_folder(tmp_path)


def test_no_template_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="has no chat template"):
        ChatTemplate.from_folder(folders.write_text_files(tmp_path, template=None))


def test_a_template_that_fails_on_every_chat_stops_the_load(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ mesages[0].content }}")
    with pytest.raises(CheckpointError, match="fails on a plain chat"):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_with_wishes_loads(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('a system message, please') }}")
    assert ChatTemplate.from_folder(tmp_path)
