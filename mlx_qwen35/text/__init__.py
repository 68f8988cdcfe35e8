"""Strings and token ids: tokenizer, chat template, stop strings, and the reply taken apart. Knows no arrays."""
