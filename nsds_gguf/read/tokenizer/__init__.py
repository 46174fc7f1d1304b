"""Tokenizer files become the tokenizer keys of a GGUF."""
