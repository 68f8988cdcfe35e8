"""The server: models behind the interfaces of OpenAI, Anthropic, LM Studio and Ollama, and a page."""
