"""Data: from the sources of a recipe to batches of token ids."""
