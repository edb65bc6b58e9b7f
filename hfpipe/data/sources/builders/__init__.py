"""`load_dataset` with builders for JSON, CSV and text that go on past what they cannot decode; see `decoding.py`.

They take the place of those of `datasets` in the table that it looks in, for files here and for data sets of the Hub.
What they read lies in its cache under a name of its own.
"""

import inspect

from datasets import load_dataset
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES, _hash_python_lines
from datasets.packaged_modules.csv import csv as their_csv
from datasets.packaged_modules.json import json as their_json
from datasets.packaged_modules.text import text as their_text

from hfpipe.data.sources import decoding
from hfpipe.data.sources.builders import csv, json, text

__all__ = ["load_dataset"]

for name, theirs, ours in (("csv", their_csv, csv), ("json", their_json, json), ("text", their_text, text)):
    lines = [line for module in (theirs, ours, decoding) for line in inspect.getsource(module).splitlines()]
    _PACKAGED_DATASETS_MODULES[name] = (ours.__name__, _hash_python_lines(lines))
