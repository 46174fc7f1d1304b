"""Model families as tables: checkpoint names, settings and GGUF keys of every class."""
