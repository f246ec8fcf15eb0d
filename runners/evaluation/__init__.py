"""Perplexity, agreement with the unquantized model, and zero-shot accuracy."""
