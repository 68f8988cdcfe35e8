"""What is asked of thinking, as variables of a template: published ones where they are at hand, and others."""

import pytest

from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.template import ChatTemplate
from mlx_qwen35.text.variables import EFFORTS, TemplateVariables
from tests.published import published_template

PLAIN = "{{ messages[0].content }}<think>"
SWITCH = "{{ messages[0].content }}{{ '' if enable_thinking is false else '<think>' }}"
STEPS = """{%- set effort = reasoning_effort | default('xhigh') -%}
{%- if effort not in ['low', 'medium', 'xhigh'] -%}{{ raise_exception('Unexpected effort ' ~ effort) }}{%- endif -%}
{{ messages[0].content }} {{ effort }}"""
ALWAYS = "{{ raise_exception('Always thinks.') if enable_thinking is false else '' }}" + STEPS
PRINTED = "{{ messages[0].content }} Effort: {{ reasoning_effort }}"
TOLD = "{{ messages[0].content }}{{ 'be short' if reasoning_effort == 'low' else 'dig' if reasoning_effort == 'high' }}"


def asked(source, **given):
    return TemplateVariables(ChatTemplate(source)).of(**given)


def efforts(source):
    return {word: asked(source, reasoning_effort=word).get("reasoning_effort") for word in EFFORTS[1:]}


def test_nothing_asked_is_left_to_the_template():
    for source in (PLAIN, SWITCH, STEPS, PRINTED):
        assert asked(source) == {}


def test_efforts_become_the_nearest_that_the_template_knows():
    wanted = {"minimal": "low", "low": "low", "medium": "medium", "high": "xhigh", "xhigh": "xhigh", "max": "xhigh"}
    assert efforts(STEPS) == efforts(ALWAYS) == wanted
    assert asked(STEPS, reasoning_effort=" LOW ") == {"reasoning_effort": "low"}


def test_efforts_of_a_template_that_takes_any_word():
    assert efforts(PRINTED) == {word: word for word in EFFORTS[1:]}
    told = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
    assert efforts(TOLD) == told


@pytest.mark.parametrize("source", [PLAIN, SWITCH])
def test_efforts_change_nothing_where_the_template_knows_none(source):
    assert all(asked(source, reasoning_effort=word) == {} for word in EFFORTS[1:])


def test_none_switches_thinking_off():
    for word in ("none", "None", "NONE"):
        assert asked(SWITCH, reasoning_effort=word) == {"enable_thinking": False}
    assert asked("{{ messages[0].content }}", reasoning_effort="none") == {}, "it does not think anyway"
    assert asked(SWITCH, reasoning_effort="none", enable_thinking=False) == {"enable_thinking": False}


def test_none_where_thinking_cannot_be_switched_off():
    with pytest.raises(PromptError, match=r"does not support .*Always thinks.*ask for 'low'"):
        asked(ALWAYS, reasoning_effort="none")
    with pytest.raises(PromptError, match="cannot switch it off"):
        asked(PLAIN, reasoning_effort="none")


@pytest.mark.parametrize("effort", ["", "lots", "hi gh", 3, True, ["low"]])
def test_what_is_no_effort(effort):
    with pytest.raises(PromptError, match="none, minimal, low, medium, high, xhigh, max"):
        asked(STEPS, reasoning_effort=effort)


@pytest.mark.parametrize(("enable_thinking", "effort"), [(True, "none"), (False, "low"), (False, "max")])
def test_effort_and_switch_that_contradict_each_other(enable_thinking, effort):
    for given in ({"enable_thinking": enable_thinking}, {"chat_template_kwargs": {"enable_thinking": enable_thinking}}):
        with pytest.raises(PromptError, match="contradict each other"):
            asked(SWITCH, reasoning_effort=effort, **given)


# Other variables


def test_any_variable_of_the_template():
    kwargs = {"add_vision_id": True, "preserve_thinking": True, "unheard_of": 5}
    assert asked(PLAIN, chat_template_kwargs=kwargs) == kwargs
    assert asked(PLAIN, preserve_thinking=False) == {"preserve_thinking": False}
    assert asked(SWITCH, chat_template_kwargs={"enable_thinking": None, "preserve_thinking": None}) == {}


def test_an_effort_among_the_variables_means_the_same():
    assert asked(STEPS, chat_template_kwargs={"reasoning_effort": "High"}) == {"reasoning_effort": "xhigh"}
    assert asked(SWITCH, chat_template_kwargs={"reasoning_effort": "none"}) == {"enable_thinking": False}
    assert asked(STEPS, chat_template_kwargs={"reasoning_effort": None}) == {}
    assert asked(STEPS, chat_template_kwargs={"reasoning_effort": "its own"}) == {"reasoning_effort": "its own"}


@pytest.mark.parametrize(
    ("named", "value", "other"),
    [("enable_thinking", True, False), ("preserve_thinking", False, True), ("reasoning_effort", "low", "high")],
)
def test_what_is_said_twice_has_to_be_the_same(named, value, other):
    same = asked(STEPS, **{named: value}, chat_template_kwargs={named: value})
    assert same == {named: value}
    with pytest.raises(PromptError, match=f"{named}.* contradict each other"):
        asked(STEPS, **{named: value}, chat_template_kwargs={named: other})


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_what_the_prompt_makes_is_refused(name):
    with pytest.raises(PromptError, match=f"cannot hold '{name}'"):
        asked(PLAIN, chat_template_kwargs={name: None})


@pytest.mark.parametrize("kwargs", [[("a", 1)], "a=1", 5, {1: 2}])
def test_what_are_no_variables(kwargs):
    with pytest.raises(PromptError, match="write a dict of the template's variables"):
        asked(PLAIN, chat_template_kwargs=kwargs)


def test_a_misspelt_variable_is_told():
    with pytest.raises(PromptError, match=r"'enable_thinkin'; this chat template knows 'enable_thinking'"):
        asked(SWITCH, chat_template_kwargs={"enable_thinkin": False})


@pytest.mark.parametrize("name", ["enable_thinking", "preserve_thinking"])
@pytest.mark.parametrize("value", ["false", 0, 1])
def test_a_switch_is_true_or_false(name, value):
    for given in ({name: value}, {"chat_template_kwargs": {name: value}}):
        with pytest.raises(PromptError, match=f"{name} is {value!r}; give True or False"):
            asked(SWITCH, **given)


# Published templates

PUBLISHED = {
    "chat_template.jinja": {},
    "chat_template.0.8B-2B.jinja": {},
    "chat_template.3.6.jinja": {},
    "chat_template.3.8.jinja": {"minimal": "low", "low": "low", "medium": "medium", "high": "xhigh", "max": "xhigh"},
    "chat_template.3.8-2.4T.jinja": {"low": "low", "medium": "medium", "high": "xhigh", "xhigh": "xhigh"},
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_published(file):
    template = ChatTemplate(published_template(file))
    of = TemplateVariables(template).of
    for effort in ("minimal", "low", "medium", "high", "xhigh", "max"):
        wanted = PUBLISHED[file].get(effort)
        made = of(reasoning_effort=effort)
        assert made.get("reasoning_effort") == wanted or wanted is None and (made == {}) == (not PUBLISHED[file])
        template.render([{"role": "user", "content": "Hello"}], **made)
    if "2.4T" in file:
        with pytest.raises(PromptError, match="Disabling thinking is not supported"):
            of(reasoning_effort="none")
    else:
        text = template.render([{"role": "user", "content": "Hello"}], **of(reasoning_effort="none"))
        assert text.endswith("<think>\n\n</think>\n\n") and "effort" not in text
