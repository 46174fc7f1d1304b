"""Where tokens and column statistics come from: random tokens, generated text, an importance matrix."""
