"""mlx-lm's own tools on a model that `load` returned: generation, batches, prompt files, scoring, training.

Knows mlx-lm's functions. Skipped, with the reason, where mlx-lm is not installed.
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest

import mlx_qwen35
from mlx_qwen35 import Sampling
from mlx_qwen35.cache import Cache
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.text.folders import write_text_files

generate = pytest.importorskip("mlx_lm.generate", reason="mlx-lm is not installed")
peer = pytest.importorskip("mlx_lm.utils")

VOCAB = 320
LAYERS = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 2,  # mlx-lm reads this and not layer_types
    "vocab_size": VOCAB,
    "eos_token_id": VOCAB - 1,
    "linear_value_head_dim": 16,
    "linear_num_value_heads": 4,
}
FFN = {"dense": {"intermediate_size": 96}, "moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}}
REVERSED = "violin, jacket, queen"
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(request.param, **LAYERS, **FFN[request.param])
    folder = write_checkpoint(tmp_path_factory.mktemp("tools") / "tiny", config, random_tensors(config, 3))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    return write_text_files(folder)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> SimpleNamespace:
    model, processor = mlx_qwen35.load(folder)
    endless = processor.for_mlx_lm()
    endless.eos_token_ids = ()  # a random model ends a turn at any time
    return SimpleNamespace(model=model, processor=processor, endless=endless, theirs=peer.load_model(folder)[0])


def ids(length: int, seed: int = 1) -> list[int]:
    return np.random.RandomState(seed).randint(0, 200, length).tolist()


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """Everything anew for each token."""
    for _ in range(count):
        tokens = [*tokens, model(mx.array([tokens]))[0, -1].argmax().item()]
    return tokens[-count:]


def batched(loaded: SimpleNamespace, prompts: list[list[int]], most: int | list[int], **options: Any) -> Any:
    return generate.batch_generate(
        loaded.model, loaded.endless, prompts, max_tokens=most, return_token_ids=True, **options
    )


class TestGeneration:
    def test_stream_generate(self, loaded: SimpleNamespace) -> None:
        """mlx-lm may draw rows of the head that no token has; of the others both draw the same."""
        prompt = loaded.processor.prompt("hello").tokens
        ours = mlx_qwen35.stream_generate(
            loaded.model, loaded.processor, prompt, max_tokens=6, sampling=Sampling(temperature=0)
        )

        def known(tokens: mx.array, logits: mx.array) -> mx.array:
            return mx.where(mx.arange(logits.shape[-1]) < loaded.processor.tokenizer.vocab_size, logits, -mx.inf)

        theirs = generate.stream_generate(
            loaded.model, loaded.processor, prompt, max_tokens=6, logits_processors=[known]
        )
        parts = list(theirs)
        assert [part.token for part in parts] == [part.token for part in ours]
        assert "".join(part.text for part in parts) == loaded.processor.decode([part.token for part in parts])

    def test_text_is_encoded_and_ends_where_a_turn_ends(self, loaded: SimpleNamespace) -> None:
        said = []

        def say(tokens: mx.array, logits: mx.array) -> mx.array:
            said.append(tokens.tolist())
            ending = loaded.processor.eos_token_id if len(said) > 2 else loaded.processor.encode("he")[0]
            return mx.where(mx.arange(logits.shape[-1]) == ending, 100.0, logits)

        text = generate.generate(loaded.model, loaded.processor, "hello", max_tokens=20, logits_processors=[say])
        assert text == "hehe" and said[0] == loaded.processor.encode("hello")

    def test_the_cache_that_it_leaves_is_right(self, loaded: SimpleNamespace) -> None:
        cache = generate.make_prompt_cache(loaded.model)
        assert isinstance(cache, Cache) and cache and len(cache) == 4
        prompt = ids(30)
        tokens = [
            part.token
            for part in generate.stream_generate(
                loaded.model, loaded.processor, prompt, max_tokens=6, prompt_cache=cache, prefill_step_size=7
            )
        ]
        assert tokens == greedy(loaded.model, prompt, 6)
        assert cache.offset == len(prompt) + 6 and sum(layer.nbytes for layer in cache) == cache.nbytes
        copied = copy.deepcopy(cache)
        first = loaded.model(mx.array([[5]]), cache)
        assert mx.array_equal(first, loaded.model(mx.array([[5]]), copied))

    def test_rows_of_unequal_prompts(self, loaded: SimpleNamespace) -> None:
        """Rows join and leave the batch, prompts are padded on the right: each row says what it says alone."""
        prompts = [ids(length, seed) for seed, length in enumerate((1, 23, 8, 40, 3))]
        counts = [9, 4, 12, 2, 7]
        sizes = {"prefill_batch_size": 3, "completion_batch_size": 4, "prefill_step_size": 6}
        made = batched(loaded, prompts, counts, return_prompt_caches=True, **sizes)
        for prompt, count, said, cache in zip(prompts, counts, made.token_ids, made.caches, strict=True):
            assert said == greedy(loaded.model, prompt, count)
            whole = loaded.model(mx.array([[*prompt, *said, 7]]))[0, -1]
            assert mx.abs(loaded.model(mx.array([[7]]), cache)[0, -1] - whole).max() < 1e-3

    def test_caches_with_a_past_become_rows(self, loaded: SimpleNamespace) -> None:
        pasts, more = [ids(5, 1), ids(19, 2), []], [ids(9, 3), ids(2, 4), ids(4, 5)]
        caches = [loaded.model.make_cache() for _ in pasts]
        for past, cache in zip(pasts, caches, strict=True):
            if past:
                loaded.model(mx.array([past]), cache)
        made = batched(loaded, more, 5, prompt_caches=caches)
        assert made.token_ids == [greedy(loaded.model, a + b, 5) for a, b in zip(pasts, more, strict=True)]

    def test_prompt_files_of_mlx_lm(self, loaded: SimpleNamespace, tmp_path: Path) -> None:
        """What mlx-lm computed and saved goes on here."""
        from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

        theirs, tokens = make_prompt_cache(loaded.theirs), ids(21)
        loaded.theirs(mx.array([tokens[:-1]]), cache=theirs)
        save_prompt_cache(str(tmp_path / "prompt.safetensors"), theirs)
        read = load_prompt_cache(str(tmp_path / "prompt.safetensors"))
        whole = loaded.model(mx.array([tokens]))[0, -1]
        assert mx.abs(loaded.model(mx.array([tokens[-1:]]), read)[0, -1] - whole).max() < 2e-3

    def test_kv_bits_is_not_ignored(self, loaded: SimpleNamespace) -> None:
        """At the first step, and not once quantized_kv_start is reached."""
        made = generate.stream_generate(loaded.model, loaded.processor, ids(5), max_tokens=2, kv_bits=8)
        with pytest.raises(ValueError, match="leave kv_bits out"):
            next(made)

    def test_caches_that_would_round_are_refused(self, loaded: SimpleNamespace) -> None:
        from mlx_lm.models.cache import ArraysCache, QuantizedKVCache, RotatingKVCache

        for other in (QuantizedKVCache(), RotatingKVCache(64)):
            caches = [ArraysCache(2), other, ArraysCache(2), other]
            with pytest.raises(ValueError, match="leave kv_bits and max_kv_size out"):
                loaded.model(mx.array([[1, 2]]), cache=caches)


class TestTokenizer:
    def test_it_is_the_one_that_transformers_loads(self, folder: Path, loaded: SimpleNamespace) -> None:
        theirs, ours = peer.load_tokenizer(folder), loaded.processor
        for text in ("hello", "the other <|im_end|> day\n\n日本"):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
            assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text)) == text
        assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
        assert ours.convert_ids_to_tokens([5, 270]) == theirs.convert_ids_to_tokens([5, 270])
        assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
        assert ours.chat_template == theirs.chat_template
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": True, "enable_thinking": False},
            {"tokenize": False, "tools": [{"type": "function", "function": {"name": "add"}}]},
            {"return_dict": False},
        ):
            chat = [*CHAT, {"role": "assistant", "content": "the"}]
            options = {"enable_thinking": True, "return_dict": False} | options
            assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)
        assert ours.apply_chat_template(chat, tokenize=False, continue_final_message=True).endswith("\nthe")

    def test_mlx_lms_wrapper(self, loaded: SimpleNamespace) -> None:
        wrapper = loaded.processor.for_mlx_lm()
        assert wrapper.eos_token_ids == set(loaded.processor.eos_token_ids)
        assert wrapper.has_thinking and wrapper.think_end == "</think>" and wrapper.has_tool_calling
        detokenizer = wrapper.detokenizer
        for token in loaded.processor.encode("hello 日本"):
            detokenizer.add_token(token)
        detokenizer.finalize()
        assert detokenizer.text == "hello 日本"


class Harness(ModuleType):
    """As much of lm_eval as mlx_lm.evaluate imports, where it is not installed."""

    def __init__(self) -> None:
        super().__init__("lm_eval")
        self.api = ModuleType("lm_eval.api")
        self.api.model, self.api.registry = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.registry")
        self.api.model.LM = object
        self.api.registry.register_model = lambda name: lambda cls: cls

    def modules(self) -> dict[str, ModuleType]:
        return {m.__name__: m for m in (self, self.api, self.api.model, self.api.registry)}


@pytest.fixture
def scorer(loaded: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """mlx_lm.evaluate's MLXLM around our model."""
    faked = importlib.util.find_spec("lm_eval") is None
    if faked:
        for name, module in Harness().modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    import mlx_lm.evaluate

    monkeypatch.setattr(mlx_lm.evaluate, "load", lambda *arguments, **options: (loaded.model, loaded.endless))
    yield mlx_lm.evaluate.MLXLM("ours", batch_size=2, use_chat_template=False)
    if faked:
        sys.modules.pop("mlx_lm.evaluate", None)


def asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


class TestEvaluate:
    def test_loglikelihood(self, loaded: SimpleNamespace, scorer: Any) -> None:
        questions = [("hello the", " hello"), ("hello the", " other day"), ("the", " end")]
        for (context, answer), (score, likeliest) in zip(
            questions, scorer.loglikelihood([asked(*q) for q in questions]), strict=True
        ):
            first, all_ids = len(loaded.processor.encode(context)), loaded.processor.encode(context + answer)
            logits = loaded.model(mx.array([all_ids]))[0]
            known = nn.log_softmax(logits)[mx.arange(first - 1, len(all_ids) - 1), mx.array(all_ids[first:])]
            assert abs(score - known.sum().item()) < 1e-3
            assert likeliest == (logits.argmax(-1).tolist()[first - 1 : -1] == all_ids[first:])

    def test_rolling_and_generate_until(self, loaded: SimpleNamespace, scorer: Any) -> None:
        texts = ["hello the other day", "the", "hello hello the end"]
        for text, score in zip(texts, scorer.loglikelihood_rolling([asked(t) for t in texts]), strict=True):
            tokens = loaded.processor.encode(text)
            logits = nn.log_softmax(loaded.model(mx.array([tokens]))[0])
            known = logits[mx.arange(len(tokens) - 1), mx.array(tokens[1:])].sum().item() if tokens[1:] else 0
            assert abs(score - known) < 1e-3
        texts = scorer.generate_until([asked(text, {"until": ["\x00"], "max_gen_toks": 5}) for text in texts])
        for text, said in zip(("hello the other day", "the", "hello hello the end"), texts, strict=True):
            whole = loaded.processor.decode(greedy(loaded.model, loaded.processor.encode(text), 5))
            assert said in (whole, whole.partition("</think>")[2])


    def test_tasks_of_lm_eval(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The harness itself, on the demo: it adds, and knows which list is reversed."""
        harness = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        import mlx_lm.evaluate
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks import TaskManager

        def task(name: str, rows: list[dict[str, Any]], **config: Any) -> Any:
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
            files = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}
            source = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{q}}"}
            return ConfigurableTask(config={"task": name, **source, **config})

        last_number = [{"function": "regex", "regex_pattern": r"(\d+)\s*$"}, {"function": "take_first"}]
        sums = task(
            "sums",
            [{"q": f"What is {a} + {b}?", "a": str(a + b)} for a, b in ((17, 25), (12, 30), (45, 54))],
            doc_to_target="{{a}}",
            output_type="generate_until",
            generation_kwargs={"until": ["\x00"], "max_gen_toks": 64},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            filter_list=[{"name": "number", "filter": last_number}],
        )
        lists = task(
            "lists",
            [{"q": "Reverse these words: queen, jacket, violin", "a": ["queen, jacket, violin", REVERSED], "right": 1}],
            doc_to_choice="a",
            doc_to_target="right",
            output_type="multiple_choice",
        )
        model, processor = mlx_qwen35.load()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(mlx_lm.evaluate, "load", lambda *given, **options: (model, processor.for_mlx_lm()))
        scored = harness.simple_evaluate(
            model=mlx_lm.evaluate.MLXLM("demo", batch_size=2),
            tasks=[sums, lists],
            apply_chat_template=True,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),  # it would read 13,000 files of tasks
        )
        assert scored["results"]["sums"]["exact_match,number"] >= 2 / 3
        assert scored["results"]["lists"]["acc,none"] == 1


class Watch:
    """A training callback that keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        self.losses.append(report["train_loss"])

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        pass


def train(
    model: Any, processor: Any, file: Path, *, kind: str = "lora", steps: int = 8, checkpointed: bool = False,
    **options: Any,
) -> list[float]:  # fmt: skip
    """Trains the last two layers on one short text, with mlx-lm's own trainer; -> losses."""
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.trainer import train as their_train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    model.freeze()
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, **options}
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    chats = [{"messages": [*CHAT, {"role": "assistant", "content": "the other day"}]}] * 2
    watch = Watch()
    their_train(
        model,
        optimizers.Adam(learning_rate=5e-3),
        CacheDataset(ChatDataset(chats, processor)),
        args=TrainingArgs(
            batch_size=2, iters=steps, steps_per_report=1, max_seq_length=64, adapter_file=str(file),
            grad_checkpoint=checkpointed,
        ),
        training_callback=watch,
    )  # fmt: skip
    model.eval()
    return watch.losses


class TestTraining:
    def test_lora(self, folder: Path, tmp_path: Path) -> None:
        model, processor = mlx_qwen35.load(folder)
        before = model(mx.array([ids(20)]))
        losses = train(model, processor, tmp_path / "adapters.safetensors")
        assert losses[-1] < 0.7 * losses[0]
        assert mx.abs(model(mx.array([ids(20)])) - before).max() > 1e-3

    def test_lora_of_a_quantized_model_loads_again(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """QLoRA, with the experts; what the trainer wrote goes back on the model, and over to mlx-lm."""
        from mlx_lm.tuner.utils import load_adapters

        from mlx_qwen35.checkpoint.adapters import load_adapter, save_adapter

        sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
        config = tiny_config("moe", **LAYERS | sizes)
        source = write_checkpoint(tmp_path / "hf", config, random_tensors(config, 3))
        folder = write_text_files(mlx_qwen35.convert(source, tmp_path / "mlx", bits=4, group_size=32))
        model, processor = mlx_qwen35.load(folder)
        losses = train(model, processor, tmp_path / "adapters.safetensors")
        assert losses[-1] < 0.7 * losses[0]
        wanted = model(mx.array([ids(20)]))
        theirs = load_adapters(peer.load_model(folder)[0], str(save_adapter(model, tmp_path / "adapter")))
        theirs.eval()
        assert mx.abs(theirs(mx.array([ids(20)])) - wanted).max() < 2e-3
        again = load_adapter(mlx_qwen35.load_model(folder), tmp_path / "adapter")
        assert mx.array_equal(again(mx.array([ids(20)])), wanted)

    def test_with_checkpointed_gradients(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Less memory, the same losses. mlx-lm changes the class of the layers for that."""
        from mlx_qwen35.model import DecoderLayer

        monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)  # put back afterwards
        config = tiny_config("dense", **LAYERS, intermediate_size=96)
        folder = write_text_files(write_checkpoint(tmp_path / "hf", config, random_tensors(config, 3)))
        losses = [
            train(*mlx_qwen35.load(folder), tmp_path / "adapters.safetensors", steps=3, checkpointed=checkpointed)
            for checkpointed in (False, True)
        ]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)

    def test_gradients_are_mlx_lms(self, loaded: SimpleNamespace, folder: Path) -> None:
        """Of every weight, by way of the same loss: the whole model can be trained."""
        from mlx.utils import tree_flatten
        from mlx_lm.tuner.trainer import default_loss

        from mlx_qwen35.checkpoint.names import TARGET

        batch, lengths = mx.array([ids(40), ids(40, 2)]), mx.array([[0, 39], [5, 30]])
        model = mlx_qwen35.load_model(folder)
        model.train()
        (loss, _), ours = nn.value_and_grad(model, default_loss)(model, batch, lengths)
        loaded.theirs.train()
        (their_loss, _), theirs = nn.value_and_grad(loaded.theirs, default_loss)(loaded.theirs, batch, lengths)
        loaded.theirs.eval()
        assert abs(loss.item() - their_loss.item()) < 1e-4
        theirs = dict(tree_flatten(theirs))
        for name, gradient in tree_flatten(ours):
            expected = theirs.pop(TARGET.source(name).names[0])
            assert mx.abs(gradient - expected).max() <= 5e-3 * (1 + mx.abs(expected).max()), name
        assert not theirs
