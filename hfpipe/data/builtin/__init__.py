"""Data that is on every machine: the corpus of installed docstrings and the small tables made from it."""
