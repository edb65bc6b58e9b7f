"""`load_dataset` with readers of ours for JSON, CSV and text, for files here and for data sets of the Hub.

`datasets` finds the files and the options, and says by its own builder what they are; where that is one of JSON, CSV or
text, ours takes its place with the same files and options. What ours reads lies in the cache under a name of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from contextlib import nullcontext
from typing import Any

import datasets
from datasets import Dataset, DatasetBuilder, IterableDataset
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text
from pyarrow.dataset import ParquetFragmentScanOptions

from hfpipe.core.upstream import builder_names, count_no_load
from hfpipe.data.sources import decoding
from hfpipe.data.sources.builders import base, csv, json, text

TABLE_ROWS = 1_000  # of Parquet read at a time: a row group may be a whole file
READERS: dict[type[DatasetBuilder], type[base.FileBuilder]] = {
    Csv: csv.CsvFiles,
    Json: json.JsonFiles,
    Text: text.TextFiles,
}
# Arguments of `load_dataset` that are not the builder's.
OF_LOADING = (
    "split",
    "streaming",
    "num_proc",
    "keep_in_memory",
    "verification_mode",
    "save_infos",
    "ignore_verifications",
)
HASH = hashlib.sha256(
    "".join(inspect.getsource(module) for module in (base, csv, json, text, decoding)).encode()
).hexdigest()


def load_dataset(path: str, **arguments: Any) -> Dataset | IterableDataset:
    """The rows of a data set; takes the arguments of `datasets.load_dataset`, `split` among them."""
    with count_no_load() if path in builder_names() else nullcontext():
        return _load_dataset(path, arguments)


def _load_dataset(path: str, arguments: dict[str, Any]) -> Dataset | IterableDataset:
    own = {name: value for name, value in arguments.items() if name not in OF_LOADING}
    builder = datasets.load_dataset_builder(path, **own)
    reader = next((ours for theirs, ours in READERS.items() if isinstance(builder, theirs)), None)
    if reader is not None:
        builder = _as(reader, builder, own)
    elif isinstance(builder, Parquet) and not arguments.get("streaming"):
        _read_in_parts(builder.config)
    else:
        return datasets.load_dataset(path, **arguments)
    if arguments.get("streaming"):
        return builder.as_streaming_dataset(split=arguments["split"])
    words = ("download_config", "download_mode", "verification_mode", "num_proc", "storage_options")
    builder.download_and_prepare(**{word: arguments[word] for word in words if arguments.get(word) is not None})
    return builder.as_dataset(split=arguments["split"], in_memory=bool(arguments.get("keep_in_memory")))


def _read_in_parts(config: Any) -> None:
    """Lets a table of Parquet files be made in flat memory, under the name in the cache that `datasets` gives it.

    By default Arrow holds the bytes of a whole file, and `datasets` reads as many rows at a time as the first row group
    has: all of a file of one group, and none (an error) where it begins with an empty one, as pandas writes it.
    """
    config.batch_size = config.batch_size or TABLE_ROWS
    config.fragment_scan_options = config.fragment_scan_options or ParquetFragmentScanOptions(pre_buffer=False)


def _as(reader: type[base.FileBuilder], builder: DatasetBuilder, arguments: dict[str, Any]) -> base.FileBuilder:
    """A builder of ours with the files and options of one of `datasets`."""
    config, usual = builder.config, type(builder.config)()
    decided = ("name", "version", "data_dir", "data_files", "description")
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in decided
        and (field.name in arguments or getattr(config, field.name) != getattr(usual, field.name))
    }
    options.setdefault("features", builder.info.features)  # that the card of a data set declares
    return reader(
        cache_dir=arguments.get("cache_dir"),
        dataset_name=builder.dataset_name,
        config_name=config.name,
        hash=HASH,
        base_path=builder.base_path,
        token=builder.token,
        repo_id=builder.repo_id,
        data_files=config.data_files,
        storage_options=builder.storage_options,
        known_as=builder.config_id,
        **options,
    )
