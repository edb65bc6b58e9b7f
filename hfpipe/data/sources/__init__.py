"""Sources: one `load_dataset` call of a recipe each, read as rows of a known format."""
