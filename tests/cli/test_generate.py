"""`generate` as a user meets it: what is printed where, and what every flag reaches."""

import json
import re
import weakref

import pytest

from mlx_qwen35 import generation, library
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.text import screen

CALL = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def test_an_answer_on_standard_output_and_nothing_else(speak, run):
    speak("hello the€re")
    done = run("generate", "--model", "x", "-p", "hi", "--no-think")
    assert (done.status, done.out, done.err) == (0, "hello the€re\n", "")


def test_the_demo_says_that_it_is_the_demo(speak, run):
    said = speak("42")
    done = run("generate", "--no-think")
    assert said.loads[0][0] is None
    assert done.out == "42\n" and "demo" in done.err and "asking it 'What is 17 + 25?'" in done.err
    done = run("generate", "--no-think", "-p", "hello")
    assert "demo" in done.err and "asking it" not in done.err


def test_reasoning_has_markers_when_piped(speak, run):
    speak("why not\n</think>\n\nhello\n")
    done = run("generate", "--model", "x", "-p", "hi", "--think")
    assert done.out == "<think>\nwhy not\n</think>\n\nhello\n"
    done = run("generate", "--model", "x", "-p", "hi", "-n", "3")
    assert done.out == "<think>\nwhy\n"  # cut: the model has not closed it


def test_tool_calls_are_shown_as_json(speak, run, tmp_path):
    speak(f"</think>\n\nI add.\n\n{CALL}")
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    done = run("generate", "--model", "x", "-p", "hi", "--tools", tools)
    assert done.out == 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>\n'


def test_a_terminal_dims_reasoning_and_is_not_steered_by_the_answer(speak, run, monkeypatch):
    monkeypatch.setattr("_pytest.capture.EncodedFile.isatty", lambda self: True)
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda self: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    speak("why\n</think>\n\n\x1b[31mred")
    done = run("generate", "--model", "x", "-p", "hi")
    assert done.out == f"{screen.DIM}why{screen.PLAIN}\n\n\u241b[31mred\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("generate", "--model", "x", "-p", "hi").out == "[thinking]\nwhy\n\n[answer]\n\u241b[31mred\n"


def test_the_prompt_from_standard_input(speak, run):
    said = speak("ok")
    run("generate", "--model", "x", "-p", "-", "--no-think", stdin="one\ntwo\n")
    assert "<|im_start|>user\none\ntwo<|im_end|>" in said.processor.decode(said.model._seen)


def test_an_empty_standard_input_is_refused_before_loading(speak, run):
    said = speak("ok")
    done = run("generate", "--model", "x", "-p", "-", stdin="\n")
    assert done.status == 2 and "standard input is empty" in done.err and said.loads == []


def test_json_object(speak, run):
    speak(f"why\n</think>\n\nI add.\n{CALL}")
    done = run("generate", "--model", "x", "-p", "hi", "--json")
    record = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert record["reasoning"] == "why" and record["content"] == "I add."
    assert record["text"] == f"why\n</think>\n\nI add.\n{CALL}"
    assert record["tool_calls"] == [{"name": "add", "arguments": {"a": "3"}}]
    assert record["finish_reason"] == "stop"
    assert record["statistics"]["generation_tokens"] > 5 and set(record["statistics"]) == {
        "prompt_tokens",
        "prompt_tps",
        "cached_tokens",
        "generation_tokens",
        "generation_tps",
        "peak_memory",
        "drafted_tokens",
        "accepted_tokens",
    }


@pytest.mark.parametrize("command", [("generate", "-p", "hi", "--json"), ("chat",)])
def test_no_token_keeps_its_log_probabilities(speak, run, monkeypatch, command):
    speak("hello the hello the hello")
    stream, given, alive = generation.stream_generate, [], []

    def watched(*args, **options):
        for part in stream(*args, **options):
            given.append(weakref.ref(part.logprobs))
            alive.append(sum(logprobs() is not None for logprobs in given))
            yield part

    monkeypatch.setattr(generation, "stream_generate", watched)
    assert run(*command, "--model", "x", "--no-think", stdin="hi").status == 0
    assert len(given) > 4 and max(alive) <= 2


def test_json_lines(speak, run):
    speak(f"why\n</think>\n\nI add.\n{CALL}")
    lines = [
        json.loads(line) for line in run("generate", "--model", "x", "-p", "hi", "--json", "lines").out.splitlines()
    ]
    assert "".join(line.get("reasoning", "") for line in lines) == "why"
    assert "".join(line.get("content", "") for line in lines) == "I add."
    assert [line["tool_call"]["name"] for line in lines if "tool_call" in line] == ["add"]
    assert lines[-1]["finish_reason"] == "stop" and "statistics" in lines[-1]


def test_statistics_and_progress_go_to_standard_error(checkpoint, run):
    done = run("generate", "--model", checkpoint, "-p", "hello", "-n", 5, "--stats", "--verbose")
    assert done.status == 0
    number = r"\d+\.\d{3}"
    assert re.search(rf"^Prompt: \d+ tokens, {number} tokens-per-sec$", done.err, re.M)
    assert re.search(rf"^Generation: 5 tokens, {number} tokens-per-sec$", done.err, re.M)
    assert re.search(rf"^Peak memory: {number} GB$", done.err, re.M)
    assert "Loading: " in done.err and "Reading the prompt: " in done.err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_exact(checkpoint, run, monkeypatch, tmp_path, command):
    made, load = [], library.load_held
    monkeypatch.setattr(library, "load_held", lambda held, **how: made.append(load(held, **how)) or made[-1])
    said = {"stdin": "hi\n"} if command == "chat" else {}
    asked = () if said else ("-p", "hi")
    for flags in ((), ("--exact",)):
        assert run(command, "--model", checkpoint, *asked, "-n", 2, *flags, **said).status == 0
    assert [model.exact for model in made] == [False, True]
    done = run(command, "--model", checkpoint, *asked, "--exact", "--adapter-path", tmp_path, **said)
    assert done.status and "merge it first" in done.err and len(made) == 2


def test_drafts(checkpoint, run):
    """A draft model (the same once more), the head of the demo, and what makes no sense."""
    asked = ("generate", "--model", checkpoint, "-p", "hello", "-n", 12, "--json")
    plain = json.loads(run(*asked).out)
    done = run(*asked, "--draft-model", checkpoint, "--num-draft-tokens", 2)
    drafted = json.loads(done.out)
    assert done.status == 0 and drafted["text"] == plain["text"]
    figures = [drafted["statistics"][name] for name in ("drafted_tokens", "accepted_tokens")]
    assert figures[0] >= figures[1] > 0 == plain["statistics"]["drafted_tokens"]
    refused = run(*asked, "--mtp")
    assert refused.status == 2 and "has no MTP layer" in refused.err
    both = run(*asked, "--mtp", "--draft-model", checkpoint)
    assert both.status == 2 and "only one can draft" in both.err
    many = run(*asked, "--draft-model", checkpoint, "--num-draft-tokens", 5)
    assert many.status == 2 and "it must be 1 to 4" in many.err
    demo = run("generate", "-p", "What is 8 + 7?", "--mtp", "--stats", "--temp", 0, "-n", 20)
    assert demo.status == 0 and re.search(r"^Drafts: \d+ of \d+ tokens accepted", demo.err, re.M)


def test_every_flag_reaches_its_place(speak, run, monkeypatch):
    said = speak("ok")
    calls, stream = [], generation.stream_generate
    monkeypatch.setattr(generation, "stream_generate", lambda *a, **k: calls.append(k) or stream(*a, **k))
    flags = "--model x -p hi --system be --no-think -n 7 --temp 0.5 --top-p 0.9 --top-k 5 --min-p 0.1"
    flags += " --repetition-penalty 1.2 --presence-penalty 0.3 --frequency-penalty 0.4 --seed 9 --stop A --stop B"
    flags += " --context-length 300 --dtype float16 --memory 8GB"
    assert run("generate", *flags.split()).status == 0
    assert said.loads[0][0] == "x"
    assert said.loads[0][1] == {"memory": "8GB", "dtype": "float16", "context_length": 300}
    (call,) = calls
    assert call["sampling"] == Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        seed=9,
    )
    assert call["max_tokens"] == 7 and call["stop"] == ["A", "B"]
    seen = said.processor.decode(said.model._seen)
    assert seen.startswith("<|im_start|>system\nbe<|im_end|>") and "<think>\n\n</think>" in seen
    run("generate", "--model", "x", "-p", "hi", "-n", "-1")
    run("generate", "--model", "x", "-p", "hi")
    assert [call["max_tokens"] for call in calls[1:]] == [None, None]


def test_defaults_come_from_the_generation_config(speak, run, monkeypatch):
    said = speak("ok", "ok")
    said.processor.generation_config.update(do_sample=True, temperature=0.6, top_k=20)
    calls, stream = [], generation.stream_generate
    monkeypatch.setattr(generation, "stream_generate", lambda *a, **k: calls.append(k["sampling"]) or stream(*a, **k))
    run("generate", "--model", "x", "-p", "hi")
    run("generate", "--model", "x", "-p", "hi", "--temperature", "0")
    assert calls == [Sampling(temperature=0.6, top_k=20), Sampling(temperature=0.0, top_k=20)]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--model", "no/such/folder", "-p", "hi"], "no/such/folder"),
        (["--model", "x"], "no prompt"),
        (["-p", ""], "empty"),
        (["-p", "hi", "--temperature", "-1"], "temperature"),
        (["-p", "hi", "--top-p", "0"], "top_p"),
        (["-p", "hi", "--max-tokens", "-2"], "--max-tokens"),
        (["-p", "hi", "--context-length", "0"], "--context-length"),
        (["-p", "hi", "--tools", "no/such/file"], "no/such/file"),
    ],
)
def test_errors_are_one_line(run, checkpoint, argv, says):
    if "--model" not in argv:
        argv = ["--model", str(checkpoint), *argv]
    done = run("generate", *argv)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err


@pytest.mark.parametrize("content, says", [("{", "not valid JSON"), ("{}", "no JSON list"), ('["x"]', "no tool")])
def test_wrong_tools_are_refused(run, checkpoint, tmp_path, content, says):
    path = tmp_path / "tools.json"
    path.write_text(content)
    done = run("generate", "--model", checkpoint, "-p", "hi", "--tools", path)
    assert done.status == 2 and says in done.err and done.err.count("\n") == 1


def test_a_prompt_over_the_context_names_the_numbers(run, checkpoint):
    done = run("generate", "--model", checkpoint, "-p", "one two three four five six seven", "--context-length", 20)
    assert done.status == 2 and "20" in done.err and done.err.count("\n") == 1


def test_a_damaged_checkpoint_is_one_line(run, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text("{")
    done = run("generate", "--model", tmp_path, "-p", "hi")
    assert done.status == 2 and "config.json" in done.err and done.err.count("\n") == 1


def test_a_closed_pipe_is_quiet(speak, run, monkeypatch):
    speak("hello")
    monkeypatch.setattr(screen.Screen, "show", lambda self, part: (_ for _ in ()).throw(BrokenPipeError))
    monkeypatch.setattr("os.dup2", lambda *arguments: None)
    done = run("generate", "--model", "x", "-p", "hi")
    assert done.status == 141 and done.err == ""


def test_usage():
    from mlx_qwen35.cli.main import main

    for argv in ([], ["generate", "--nonsense"], ["generate", "--json", "xml"], ["--temp"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2


def test_flags_of_the_template_and_of_thinking(speak, run, monkeypatch):
    said = speak("why\n</think>\n\nok")
    calls, stream = [], generation.stream_generate
    monkeypatch.setattr(generation, "stream_generate", lambda *a, **k: calls.append(k) or stream(*a, **k))
    told, prompt = [], said.processor.prompt
    monkeypatch.setattr(said.processor, "prompt", lambda *a, **k: told.append(k) or prompt(*a))
    flags = ["--system-prompt", "be", "--reasoning-effort", "low", "--preserve-thinking", "--allow-control-tokens"]
    flags += ["--chat-template-config", '{"a": [1]}', "--thinking-budget", 99, "--prefill-step-size", 7, "-m", 30]
    assert run("generate", "--model", "x", "-p", "hi", *flags).status == 0
    assert told[-1] == {
        "system": "be",
        "reasoning_effort": "low",
        "preserve_thinking": True,
        "chat_template_kwargs": {"a": [1]},
        "allow_control_tokens": True,
    }
    assert (calls[-1]["thinking_budget"], calls[-1]["chunk_size"], calls[-1]["max_tokens"]) == (99, 7, 30)
    run("chat", "--model", "x", "--chat-template-args", '{"b": 2}', "--no-preserve-thinking", stdin="hi\n")
    assert told[-1] == {"preserve_thinking": False, "chat_template_kwargs": {"b": 2}}


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    "flag, says",
    [
        (["--chat-template-config", "{"], "--chat-template-config is not valid JSON"),
        (["--chat-template-config", "[1]"], "--chat-template-config is no JSON object"),
        (["--thinking-budget", "-1"], "--thinking-budget is -1; it must be 0 or more"),
        (["--prefill-step-size", "0"], "--prefill-step-size is 0; it must be 1 or more"),
        (["--reasoning-effort", "very"], "reasoning_effort"),
        (["--extra-eos-token", "no such token"], "'no such token' is no token of this checkpoint"),
    ],
)
def test_wrong_ones_are_one_line_before_weights_are_read(speak, run, monkeypatch, command, flag, says):
    speak("ok")
    monkeypatch.setattr(library, "load_held", lambda *a, **k: pytest.fail("weights are read"))
    done = run(command, "--model", "x", *(["-p", "hi"] if command == "generate" else []), *flag, stdin="hi\n")
    assert says in done.err and done.err.count("\n") == 1 and (done.status, done.out) == (2, "")


def test_a_budget_closes_the_reasoning(speak, run):
    speak("why\n</think>\n\nok")
    plain = run("generate", "--model", "x", "-p", "hi", "--think", "--thinking-budget", 2, "--json")
    assert json.loads(plain.out)["reasoning"].endswith("based on the thinking directly now.")
    cut = run("generate", "--model", "x", "-p", "hi", "--think", "-n", 1)
    assert "It was still reasoning: --thinking-budget N ends that early" in cut.err


def test_thinking_is_hidden_where_it_is_not_wanted(speak, run):
    speak("why not\n</think>\n\nhello")
    asked = ("generate", "--model", "x", "-p", "hi", "--think", "--hide-thinking")
    assert run(*asked).out == "hello\n"
    record = json.loads(run(*asked, "--json").out)
    assert record["content"] == "hello" and not {"reasoning", "text"} & set(record)
    lines = [json.loads(line) for line in run(*asked, "--json", "lines").out.splitlines()]
    assert [line["content"] for line in lines if "content" in line] and not any("reasoning" in line for line in lines)
    assert run("chat", "--model", "x", "--think", "--hide-thinking", stdin="hi\n").out == "hello\n"
    cut = run(*asked, "-n", 2)
    assert cut.out == "" and "It was still reasoning" in cut.err


def test_tokens_that_end_an_answer_too(speak, run):
    speak("hello</tool_call>the")
    asked = ("generate", "--model", "x", "-p", "hi", "--no-think")
    assert run(*asked, "--extra-eos-token", "</tool_call>", "<tool_call>").out == "hello\n"


def test_a_prompt_without_the_template(checkpoint, run):
    asked = ("generate", "--model", checkpoint, "-p", "<|im_start|>hello", "--ignore-chat-template", "-n", 1)
    count = json.loads(run(*asked, "--json").out)["statistics"]["prompt_tokens"]
    assert 1 < count < 6 < json.loads(run(*asked[:5], "-n", 1, "--json").out)["statistics"]["prompt_tokens"]
    refused = run(*asked, "--system", "be")
    assert refused.status == 2 and "need the template" in refused.err


def test_the_prompt_and_what_is_piped_in(speak, run):
    said = speak("ok")
    run("generate", "--model", "x", "-p", "Review:", "--no-think", stdin="one\ntwo\n")
    assert "<|im_start|>user\nReview:\n\none\ntwo<|im_end|>" in said.processor.decode(said.model._seen)
    run("generate", "--model", "x", "--no-think", stdin="alone\n")
    assert "<|im_start|>user\nalone<|im_end|>" in said.processor.decode(said.model._seen)


def test_a_second_call_computes_only_what_is_new(run, tmp_path):
    document = " ".join(f"word{number}" for number in range(120))
    asked = ["generate", "--json", "--temperature", "0", "-n", "8", "--cache-dir", str(tmp_path / "kept")]
    first = json.loads(run(*asked, "--system", document, "-p", "What is 17 + 25?").out)
    second = json.loads(run(*asked, "--system", document, "-p", "Sort: b, a").out)
    again = json.loads(run(*asked, "--system", document, "-p", "What is 17 + 25?").out)
    assert first["statistics"]["cached_tokens"] == 0
    assert second["statistics"]["cached_tokens"] > 200 > second["statistics"]["prompt_tokens"]
    assert again["text"] == first["text"]
    refused = run(*asked, "--session", str(tmp_path / "a.session"), "-p", "Hello")
    assert refused.status != 0 and "give one of them" in refused.err
