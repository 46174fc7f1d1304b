"""What a finished file is worth: structure, perplexity, divergence, embeddings."""
