"""The base model: tokenizer, loading, quantization, adapters, merging."""
