"""Rows of weights become bytes: round-to-nearest by ggml, GPTQ, and the file that they are written to."""
