"""From a checkpoint of any form to GGUF files that llama.cpp loads."""
