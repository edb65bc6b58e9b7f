"""The memory of cleaning: of each row eight bytes, a MinHash signature on disk, and the sequences of suites it holds.

Near duplicates are found by MinHash (Broder 1997, "On the resemblance and containment of documents") over word 5-grams,
as Lee et al. 2022 (arXiv:2107.06499) and FineWeb (Penedo et al. 2024, arXiv:2406.17557) do.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from hfpipe.data.cleaning.contamination import MULTIPLIER, SuiteIndex, grams_of, packed, unpacked, words_of
from hfpipe.recipe.row_formats import text_of

NGRAM = 5
PERMUTATIONS = 128  # the standard error of an estimated similarity of 0.8 is 0.035
AT_ONCE = 10_000  # rows, or sequences of one row, that are held in memory as numbers
NEIGHBOURS = 16  # earlier rows of a bucket that a row is compared with
NOTHING = np.zeros(0, np.uint64)
Row = Mapping[str, Any]
KEPT, DUPLICATE, NEAR, SUITE, DUPLICATE_OF_OTHER, NEAR_OTHER = range(6)
REASONS = {
    DUPLICATE: "duplicate",
    NEAR: "near duplicate",
    SUITE: "overlaps a suite",
    DUPLICATE_OF_OTHER: "duplicate of another source",
    NEAR_OTHER: "near duplicate of another source",
}


def write_sketch(rows: Iterable[Row | None], path: Path, *, near: bool, index: SuiteIndex | None) -> None:
    """Sketches rows into `path`.npz and `path`.signatures.

    Args:
        rows: The rows in order; None for one that is dirty.
        path: Where to, without the suffix.
        near: Whether signatures are wanted.
        index: The rows of the suites, where overlap with them is wanted.
    """
    hashes, found = array("Q"), []
    sketcher = _MinHash() if near else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".signatures").open("wb") as file:
        for place, row in enumerate(rows):
            text = None if row is None else text_of(row)
            hashes.append(0 if text is None else xxh3_64_intdigest(text.encode()) or 1)
            if sketcher is not None:
                file.write(sketcher.signature(text or "", words_of(text) if text else NOTHING).tobytes())
            if index is not None and row is not None:
                found += [one] if (one := index.look_at(row, place, near=False)) is not None else []
    columns = {"hashes": np.asarray(hashes, np.uint64), **packed(found)}
    beside = path.with_name(f".{path.name}.npz")
    np.savez(beside, **columns)  # type: ignore[arg-type]
    beside.replace(path.with_suffix(".npz"))  # last, so that a sketch which has it is whole


class _MinHash:
    """datasketch's MinHash, filled anew for each row."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=lambda value: value)

    def signature(self, text: str, words: np.ndarray) -> np.ndarray:
        """(PERMUTATIONS,) uint32. A text without words is like itself alone."""
        grams = np.unique(grams_of(words, NGRAM) >> np.uint64(32))
        if not len(grams):
            grams = np.array([xxh3_64_intdigest(text.encode()) >> 32], np.uint64)
        self._minhash.clear()
        for start in range(0, len(grams), AT_ONCE):
            self._minhash.update_batch(grams[start : start + AT_ONCE].tolist())
        return np.asarray(self._minhash.hashvalues, np.uint32)


def judge(
    paths: Sequence[Path],
    *,
    exact: bool,
    near: float | None,
    suites: SuiteIndex | None,
    earlier: Sequence[tuple[Sequence[Path], np.ndarray]] = (),
) -> tuple[np.ndarray, list[int]]:
    """The rows that are removed, and the reasons.

    Rows that overlap a suite go first, by the rule of `SuiteIndex`, and those that hold a run of 13 words of it which
    is no common phrase (Brown et al. 2020, arXiv:2005.14165, appendix C). Of what is left, the first of its like stays.

    Args:
        paths: The sketches, in the order of the source.
        exact: Whether equal texts are looked for.
        near: Least similarity of near duplicates; None to look for none.
        suites: The rows of the suites, where overlap with them is looked at.
        earlier: Of each source that was judged before and whose texts count as seen, its sketches and reasons.

    Returns:
        (N,) reasons, and the number of rows of each sketch.
    """
    sketches = [dict(np.load(path.with_suffix(".npz"))) for path in paths]
    sizes = [len(sketch["hashes"]) for sketch in sketches]
    begins = np.cumsum([0, *sizes[:-1]]).astype(np.uint64)
    hashes = np.concatenate([sketch["hashes"] for sketch in sketches])
    reasons = np.zeros(len(hashes), np.uint8)
    if suites is not None:
        found = [
            one for sketch, begin in zip(sketches, begins.tolist(), strict=True) for one in unpacked(sketch, begin)
        ]
        _, overlapping = suites.judge(found)
        reasons[sorted(overlapping)] = SUITE
    left = np.flatnonzero((hashes != 0) & (reasons == KEPT))
    seen = [_hashes_of(before) for before, _ in earlier]
    if exact:
        kept = [one[why == KEPT] for one, (_, why) in zip(seen, earlier, strict=True)]
        _, first = np.unique(hashes[left], return_index=True)
        reasons[np.delete(left, first)] = DUPLICATE
        reasons[left[np.isin(hashes[left], np.concatenate([NOTHING, *kept]))]] = DUPLICATE_OF_OTHER
    elif near is not None and len(left):
        whys = [why for _, why in earlier]
        usable = [(one != 0) & (why != SUITE) for one, why in zip(seen, whys, strict=True)]
        mine = np.zeros(len(hashes), bool)
        mine[left] = True
        rows = np.flatnonzero(np.concatenate([*usable, mine]))
        begin = len(rows) - len(left)
        with _signatures_of([path for before, _ in earlier for path in before] + [*paths]) as signatures:
            reasons[left] = _near_duplicates(signatures, rows, begin, near)[begin:]
    return reasons, sizes


def _hashes_of(paths: Sequence[Path]) -> np.ndarray:
    return np.concatenate([np.load(path.with_suffix(".npz"))["hashes"] for path in paths])


@contextmanager
def _signatures_of(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """(N, PERMUTATIONS) the signatures of sketches one after the other, on disk."""
    whole = paths[0].with_name("signatures")
    with whole.open("wb") as file:
        for path in paths:
            with path.with_suffix(".signatures").open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 24)
    try:
        yield np.memmap(whole, np.uint32, mode="r").reshape(-1, PERMUTATIONS)
    finally:
        whole.unlink()


def _near_duplicates(signatures: np.ndarray, rows: np.ndarray, begin: int, threshold: float) -> np.ndarray:
    """(R,) whether each of `rows` from `begin` on is like one that comes before it: NEAR, NEAR_OTHER or KEPT.

    Signatures are cut into bands; rows that agree in one are compared whole, each with those before it in its bucket.
    """
    from datasketch import MinHashLSH

    # A missed pair is ten times as bad as a comparison for nothing, since whatever meets is compared.
    plan = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    found = np.zeros(len(rows), np.uint8)
    found[:begin] = NEAR_OTHER  # judged already: nobody compares them with what stands before
    for band in range(plan.b):
        columns = slice(band * plan.r, (band + 1) * plan.r)
        keys = np.concatenate([_keys(signatures[part, columns]) for part in _parts(rows)])
        order = np.argsort(keys, kind="stable")
        for lag in range(1, NEIGHBOURS + 1):
            first, second = order[:-lag], order[lag:]
            meet = np.flatnonzero((keys[first] == keys[second]) & (found[second] == KEPT))
            if not len(meet):
                break
            for part in _parts(meet):
                one, other = first[part], second[part]
                alike = (signatures[rows[one]] == signatures[rows[other]]).mean(axis=1) >= threshold
                found[other[alike]] = np.where(one[alike] < begin, NEAR_OTHER, NEAR)
    return found


def _parts(values: np.ndarray) -> list[np.ndarray]:
    return [values[start : start + AT_ONCE] for start in range(0, len(values), AT_ONCE)]


def _keys(bands: np.ndarray) -> np.ndarray:
    """(R,) one hash of each row of (R, columns) numbers."""
    keys = np.zeros(len(bands), np.uint64)
    for column in bands.T.astype(np.uint64):
        keys = (keys ^ (column * MULTIPLIER)) * MULTIPLIER
        keys ^= keys >> np.uint64(29)
    return keys


def remove_sketch(path: Path) -> None:
    """Deletes what `write_sketch` wrote."""
    for suffix in (".npz", ".signatures"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def counts_of(reasons: np.ndarray) -> dict[str, Any]:
    """Rows removed by reason."""
    return {name: int(count) for why, name in REASONS.items() if (count := (reasons == why).sum())}
