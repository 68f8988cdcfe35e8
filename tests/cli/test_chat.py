"""`chat`: turns, commands, and what is kept of the computation between turns."""

from mlx_qwen35 import generation
from mlx_qwen35.cli.chat.transcript import recalled


def test_turns_remember_one_another(speak, run):
    said = speak("hello", "the hello")
    done = run("chat", "--model", "x", "--no-think", "--system", "be", stdin="one\n\ntwo\n")
    assert (done.status, done.out, done.err) == (0, "hello\nthe hello\n", "")
    seen = said.processor.decode(said.model._seen)
    assert seen.startswith("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\none<|im_end|>\n")
    assert "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n" in seen


def test_what_was_computed_is_kept_up_to_the_last_answer(speak, run):
    said = speak("hello", "hello", "hello")
    questions = ["one " * 20, "two " * 20, "three " * 20]
    run("chat", "--model", "x", "--no-think", stdin="\n".join(questions))
    # every question is computed once; of each turn only the answer is computed again, as the template rewrites it
    alone = len(said.processor.prompt(questions[0]).tokens)
    assert said.model.computed < 3 * (alone + 30)
    done = run("chat", "--model", "x", "--no-think", "--stats", stdin="\n".join(questions))
    assert done.err.count("more from the cache") == 2


def test_reset_help_and_exit(speak, run):
    said = speak("hello", "two", "three")
    done = run("chat", "--model", "x", "--no-think", stdin="one\n/reset\none\n/help\n/exit\none\n")
    assert done.out == "hello\nhello\n" and "/reset" in done.err
    assert said.processor.decode(said.model._seen).count("one") == 1


def test_an_answer_without_a_token_leaves_no_message(speak, run):
    said = speak("hello")
    done = run("chat", "--model", "x", "--no-think", "-n", "0", stdin="one\ntwo\n")
    assert (done.status, done.out) == (0, "")
    assert "one" not in said.processor.decode(said.model._seen)


def test_a_penalty_knows_the_kept_tokens(speak, run, monkeypatch):
    speak("hello", "hello")
    calls, stream = [], generation.stream_generate


    def watched(*given, session, **options):
        calls.append((given[2], len(session.tokens)))
        return stream(*given, session=session, **options)

    monkeypatch.setattr(generation, "stream_generate", watched)
    run("chat", "--model", "x", "--no-think", stdin="one\ntwo\n")
    assert [kept > 5 for _, kept in calls] == [False, True]
    assert all(prompt.text.startswith("<|im_start|>user\none<|im_end|>") for prompt, _ in calls)


def test_a_tool_call_waits_for_its_result(speak, run, tmp_path):
    call = "<tool_call>\n<function=add>\n</function>\n</tool_call>"
    said = speak(f"</think>\n\n{call}", "</think>\n\nhello")
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "add"}}]')
    done = run("chat", "--model", "x", "--tools", tools, stdin="one\n42\n")
    assert done.out.endswith("</tool_call>\nhello\n")
    seen = said.processor.decode(said.model._seen)
    assert "<|im_start|>tool\n42<|im_end|>" in seen and "<function=add>" in seen


def test_a_message_that_does_not_fit_leaves_the_chat_as_it_was(speak, run):
    said = speak("hello", "the")
    object.__setattr__(said.processor, "context_length", 60)
    done = run("chat", "--model", "x", "--no-think", stdin=f"one\n{'hello ' * 80}\nthree\n")
    assert done.out == "hello\nthe\n" and done.status == 0
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_a_chat_with_drafts_says_the_same(run):
    """The demo's head drafts over two turns, of which the second goes on from the first."""
    asked = "What is 8 + 7?\nReverse this: stone\n"
    options = ("--temp", 0, "--no-think", "-n", 30, "--context-length", 400)
    plain = run("chat", *options, stdin=asked)
    drafted = run("chat", *options, "--mtp", "--num-draft-tokens", 2, "--stats", stdin=asked)
    assert plain.status == drafted.status == 0 and drafted.out == plain.out
    assert drafted.err.count("tokens accepted") >= 1  # what pays is measured


def test_reasoning_is_recalled_by_its_length():
    said = [{"role": "user", "content": "hi"}]
    shown = [recalled([(said, {"content": "", "reasoning_content": text})], 80) for text in ("9+9=18", "so be it")]
    assert shown == ["> hi\n[thought, 1 word]", "> hi\n[thought, 3 words]"]
