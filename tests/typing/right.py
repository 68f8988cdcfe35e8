"""The public face as programs use it. Never run: a type checker reads it, in its strict mode, and finds nothing."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

import mlx_qwen35
from mlx_qwen35 import (
    Chat,
    Engine,
    Model,
    Part,
    Processor,
    ProgressBar,
    PromptError,
    Qwen35Error,
    Reply,
    Sampling,
    Session,
    Sessions,
    Store,
    convert,
    estimate,
    fuse,
    generate,
    generate_batch,
    list_models,
    load,
    load_adapter,
    load_draft_model,
    load_model,
    load_processor,
    load_session,
    save_adapter,
    serve,
    stream_generate,
)


def told(done: int, total: int) -> None:
    print(f"{done} of {total}, version {mlx_qwen35.__version__}")


def loaded() -> tuple[Model, Processor]:
    model, processor = load("folder", memory="24GB", mtp=True, on_progress=told)
    alone: Model = load_model("folder", kernels=False)
    reads: Processor = load_processor("folder", context_length=4096)
    logits: mx.array = model(mx.array([[1, 2, 3]]), model.make_cache())
    print(alone, reads, logits.shape)
    return model, processor


def one(model: Model, processor: Processor) -> str:
    stop = threading.Event()
    text = ""
    for part in stream_generate(
        model,
        processor,
        [{"role": "user", "content": "What is 17 + 25?"}],
        max_tokens=200,
        sampling=Sampling(temperature=0.7, top_p=0.9, seed=1),
        stop=["\n\n"],
        thinking_budget=100,
        tools=[{"type": "function", "function": {"name": "add"}}],
        response_format={"type": "json_object"},
        deadline=2.5,
        on_progress=told,
        cancel=stop,
    ):
        text += part.content
        if part.finish_reason == "length":
            stop.set()
    whole: str = generate(model, processor, "again", content_only=True, max_tokens=5, cancel=lambda: False)
    many = generate_batch(model, processor, ["one", "two"], max_tokens=[5, None], most_rows=2)
    return text + whole + "".join(completion.text for completion in many)


def seen(part: Part) -> Mapping[str, float | None]:
    return {"speed": part.generation_tps, "rate": part.prompt_tps}


def kept(model: Model, processor: Processor, path: Path) -> Session:
    session = Session(model, processor)
    for part in stream_generate(model, processor, "What is 17 + 25?", session=session, store=None):
        print(seen(part))
    session.save(path)
    shared = Sessions(model, processor, most_bytes=10**9)
    print(shared, Store(model, processor, most_bytes=10**9))
    return load_session(path, model, processor)


def talk(model: Model, processor: Processor) -> Reply:
    chat = Chat(model, processor, system="Be short.", max_tokens=100, sampling=Sampling(temperature=0), fetch=True)
    try:
        reply = chat.send("Where is the blue square?", images=["shapes.png"], enable_thinking=False)
    except PromptError as error:
        raise Qwen35Error(str(error)) from error
    print(chat.history, reply.text, reply.tool_calls)
    return chat.regenerate(sampling=Sampling(seed=2))


async def together(model: Model, processor: Processor) -> list[str]:
    with Engine(model, processor, most_rows=8, memory="60%") as engine:
        answers = [engine.submit(f"What is {n} + 25?", max_tokens=200, priority=n) for n in (17, 30)]
        async for part in answers[0]:
            print(part.content)
        for part in answers[1]:
            print(part.reasoning)
        return [str(answer.done) for answer in answers]


def prepared(folder: Path) -> None:
    convert("Qwen/Qwen3.5-4B", folder, bits=4, target_size="3GB", on_progress=ProgressBar("Converting"))
    print(estimate("Qwen/Qwen3.5-27B", mac="24GB"), list_models())
    model, processor = load(folder)
    adapted: Model = load_adapter(model, folder)
    save_adapter(fuse(adapted), folder)
    draft = load_draft_model("small", model)
    asyncio.run(together(model, processor))
    print(generate(model, processor, [1, 2, 3], draft_model=draft))
    serve(folder, port=1234, kv_bits=8, cors=["https://example.org"])
