"""Data: sources, the built-in corpus, tokens and labels, the stream, rows, batches."""
