"""Mistakes in using the public face. Never run: a type checker has to refuse each line that says so, and no other."""

from mlx_qwen35 import (
    Chat,
    Engine,
    Model,
    Processor,
    Sampling,
    convert,
    generate,
    generate_batch,
    load,
    serve,
    stream_generate,
)


def asked(model: Model, processor: Processor, engine: Engine, chat: Chat) -> None:
    stream_generate(model, processor, "hi", max_token=5)  # wrong
    stream_generate(model, processor, "hi", max_tokens="5")  # wrong
    generate(model, processor, "hi", max_token=5)  # wrong
    generate(model, processor, "hi", max_tokens="5")  # wrong
    generate(model, processor, "hi", temperature=0.5)  # wrong
    generate(model, processor, "hi", cancel=3)  # wrong
    generate_batch(model, processor, ["hi"], max_token=5)  # wrong
    engine.submit("hi", max_token=5)  # wrong
    engine.submit("hi", cache=model.make_cache())  # wrong
    engine.submit("hi", stop=5)  # wrong
    Chat(model, processor, max_token=5)  # wrong
    Chat(model, processor, fps="1")  # wrong
    chat.send("hi", max_token=5)  # wrong
    chat.send("hi", sampling={"temperature": 0})  # wrong
    chat.send("hi", session=None)  # wrong
    chat.regenerate(sample=Sampling())  # wrong
    chat.send_results("42", max_token=5)  # wrong
    Sampling(temperatur=0.5)  # wrong
    load("folder", memori="24GB")  # wrong
    convert("folder", "target", bit=4)  # wrong
    convert("folder", "target", bits="4")  # wrong
    serve("folder", prot=1)  # wrong
    serve("folder", kv_bits="8")  # wrong
    generate(processor, model, "hi")  # wrong
    number: int = generate(model, processor, "hi")  # wrong
    print(number)
