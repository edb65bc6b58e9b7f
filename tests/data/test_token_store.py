"""Tokens of fine-tuning rows in a mapped file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hfpipe.data.token_store import TokenStore


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system tells nothing of its maps")
def test_tokens_that_were_read_leave_the_memory(tmp_path: Path) -> None:
    """A process that opens or reads 160 MB of tokens, in whatever order, holds at most 80 MB of them."""
    tokens = np.zeros(400, np.int32)

    def mapped() -> int:
        (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssFile"))
        return int(line.split()[1]) // 1024

    lists = pa.ListArray.from_arrays(
        np.arange(0, 401 * 100_000, 400, dtype=np.int32)[:100_001], np.tile(tokens, 100_000)
    )
    runs = pa.ListArray.from_arrays(np.arange(0, 2 * 100_001, 2, dtype=np.int32), np.tile(np.int32([0, 400]), 100_000))
    table = pa.table({"input_ids": lists, "trained": runs})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    del table, lists, runs
    before = mapped()
    store = TokenStore(tmp_path / "t.arrow")
    most = mapped()
    assert (store.lengths_of("input_ids").max(), store.trained) == (400, 400 * 100_000)
    most = max(most, mapped())
    for count, number in enumerate(np.random.default_rng(0).permutation(len(store))):
        store[int(number)]["labels"].sum()
        if count % 203 == 0:
            most = max(most, mapped())
    assert most - before < 80
