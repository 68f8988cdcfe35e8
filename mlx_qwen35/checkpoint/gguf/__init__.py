"""GGUF, llama.cpp's file format: the container, its blocks, and what it calls the parts of a Qwen3.5."""
