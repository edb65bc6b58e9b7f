"""CSV with bytes that are not UTF-8."""

from dataclasses import dataclass

from datasets.packaged_modules.csv.csv import Csv, CsvConfig

from hfpipe.data.lenient import HANDLER


@dataclass
class MarkingCsvConfig(CsvConfig):
    """As that of `datasets`."""

    encoding_errors: str | None = HANDLER


class MarkingCsv(Csv):
    """Marks bytes that are not UTF-8."""

    BUILDER_CONFIG_CLASS = MarkingCsvConfig
