"""Data: from the sources of a recipe to batches of token ids.

1. `sources/` opens a source and brings its rows to one format, by the table in `hfpipe/recipe/row_formats.py`.
2. `cleaning/` and `dedup.py` leave out rows that are dirty, doubled, or stand in a suite too.
3. `tokenize.py`, `labels.py` and `masking.py` make token ids of rows, and say which of them are learned.
4. `stream/` does this for pretraining, a window of documents at a time, in lanes that resume exactly.
5. `dataloader.py` serves rows in batches, the same ones on any number of ranks.
"""
