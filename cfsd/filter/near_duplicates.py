"""Near duplicates: rows of a corpus that are almost an earlier row that stays.

Rows whose MinHash signatures agree in a band are compared by their n-grams. The bands and the n-grams are on disk;
memory holds about 20 bytes per row, and one band at a time.

R rows, G n-grams, P pairs of rows.

Source: Lee et al. 2021, arXiv:2107.06499, section 4.2: the Jaccard index of sets of 5-grams, candidates by MinHash in
bands. Differs: n-grams of sampled token ids, not of words; 128 permutations in place of 9,000, as a row is not a web
page; a candidate is judged by the exact index, not by an edit distance; no connected components, because a
long chain ends in a row that resembles none that stays.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from cfsd.data.ngrams import Hashes, Ints, Rows, ngrams
from cfsd.store.tables import blocks, num_rows

ORDER = 5
PERMUTATIONS = 128
SCHEME = "affine32"  # how datasketch permutes; pinned, since its default has changed once
# Weights of a false candidate and of a missed pair in the choice of bands. False candidates are compared in vain only.
# At threshold 0.8 that is 17 bands of 7, which find a pair of index 0.8 with odds of 0.98, one of 0.85 with 0.999.
WEIGHTS = (0.02, 0.98)
MAX_BANDED = 0.99  # above it datasketch finds no two bands
BLOCK = 512  # rows in memory at once, 128 or 8,192 tokens long
PAIR_GRAMS = 1 << 22  # n-grams compared at once


class _Index(NamedTuple):
    """The bands and n-grams of all rows, in files, in reading order."""

    folder: Path
    bands: int
    ends_R: Ints  # where each row's n-grams end in their file

    def band(self, number: int) -> Path:
        return self.folder / f"band-{number:03}"

    @property
    def grams(self) -> Path:
        return self.folder / "ngrams"


def duplicates_of(corpus: Path, threshold: float, scratch: Path, on_progress: Callable[[int, int], None]) -> Ints:
    """Return the sorted positions, in reading order of the `corpus` table, of the rows to reject.

    A row is rejected exactly if the sets of 5-grams of its sampled tokens and of an earlier row that stays have a
    Jaccard index of at least `threshold` (0.6 to 1), and their signatures share a band. A row of fewer
    than 5 sampled tokens always stays. `scratch` may hold a million rows of 128 tokens in 600 MB, and is empty after.
    `on_progress(done, total)` counts rows.
    """
    folder = scratch / "near-duplicates"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lsh = MinHashLSH(threshold=min(threshold, MAX_BANDED), num_perm=PERMUTATIONS, weights=WEIGHTS)
    total = num_rows(corpus, "corpus")
    index = _Index(folder, lsh.b, np.zeros(0, np.int64))
    counts_R = np.fromiter(_write(index, lsh.r, corpus, lambda done: on_progress(done, total)), np.int64)
    rejected = _like_an_earlier_one(index._replace(ends_R=counts_R.cumsum()), threshold)
    shutil.rmtree(folder)
    return rejected


def _write(index: _Index, width: int, corpus: Path, on_progress: Callable[[int], None]) -> Iterator[int]:
    """Write the files of `index`; yield how many different n-grams each row has."""
    with ExitStack() as stack:
        grams = stack.enter_context(index.grams.open("wb"))
        bands = [stack.enter_context(index.band(number).open("wb")) for number in range(index.bands)]
        for first, block in blocks(corpus, "corpus", ["token_ids", "logprobs"], BLOCK):
            sets = _gram_sets(block)
            signatures = _signatures(sets)
            for number, file in enumerate(bands):
                _hashed(signatures[:, number * width : (number + 1) * width]).tofile(file)
            np.concatenate(sets).tofile(grams)
            yield from map(len, sets)
            on_progress(first + len(sets))


def _gram_sets(batch: pa.RecordBatch) -> list[NDArray[np.uint32]]:
    """Return the different n-grams of each row as sorted numbers of 32 bits."""
    row_T = pc.list_parent_indices(batch["token_ids"]).to_numpy()
    sampled_T = batch["logprobs"].flatten().is_valid().to_numpy(zero_copy_only=False)
    grams = ngrams(Rows(batch["token_ids"].flatten().to_numpy(), row_T, sampled_T), ORDER)
    keys = _distinct(grams.row_G.astype(np.uint64) << np.uint64(32) | grams.hash_G >> np.uint64(32))
    edges = np.searchsorted(keys, np.arange(1, batch.num_rows, dtype=np.uint64) << np.uint64(32))
    return np.split(keys.astype(np.uint32), edges)


def _distinct(values: Hashes) -> Hashes:
    """Return the different `values`, sorted; three times as fast as NumPy 2.4's `unique`, which hashes."""
    ordered = np.sort(values)
    distinct: Hashes = ordered[np.diff(ordered, prepend=~ordered[:1]) != 0]
    return distinct


def _signatures(sets: list[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """Return one row of PERMUTATIONS values per set; 47 microseconds per row of 124 n-grams.

    The n-grams are hashes already, so datasketch takes them as they are: its SHA-1 would cost twice the rest.
    """
    sketches = MinHash.generator(
        (grams.tolist() for grams in sets), num_perm=PERMUTATIONS, scheme=SCHEME, hashfunc=lambda value: value
    )
    return np.stack([sketch.hashvalues for sketch in sketches])


def _hashed(values: NDArray[np.uint32]) -> Hashes:
    """Return 64 bits per row by FNV-1a over its values. Rows that share them by chance are compared in vain."""
    hash_R = np.full(len(values), 0xCBF29CE484222325, np.uint64)
    for column in values.T:
        hash_R = (hash_R ^ column) * np.uint64(0x100000001B3)
    return hash_R


def _like_an_earlier_one(index: _Index, threshold: float) -> Ints:
    """Return the rows that resemble an earlier row that stays.

    In rounds: a row stays if no earlier undecided row shares a band with it, and the rows that resemble it go. So no
    pair of rejected rows is ever compared, however many copies of one text there are.
    """
    undecided_R = np.diff(index.ends_R, prepend=0) > 0
    rejected_R = np.zeros(len(undecided_R), bool)
    while undecided_R.any():
        first, later = _candidates(index, np.flatnonzero(undecided_R))
        waits_R = np.zeros(len(undecided_R), bool)
        waits_R[later] = True
        stays = ~waits_R[first]
        first, later = first[stays], later[stays]
        rejected_R[later[_overlaps(index, first, later) >= threshold]] = True
        undecided_R &= waits_R & ~rejected_R
    return np.flatnonzero(rejected_R)


def _candidates(index: _Index, rows: Ints) -> tuple[Ints, Ints]:
    """Return pairs, each once: the first of the rows that share a band, and every later one of them."""
    candidates: list[Hashes] = [np.zeros(0, np.uint64)]
    for number in range(index.bands):
        hashes = np.memmap(index.band(number), np.uint64, "r")[rows]
        order = np.argsort(hashes, kind="stable")
        is_first = np.concatenate([[True], np.diff(hashes[order]) != 0])
        leader = np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))
        later = ~is_first
        pairs = rows[order[leader[later]]] << 32 | rows[order[later]]
        candidates.append(pairs.astype(np.uint64))
    both = _distinct(np.concatenate(candidates)).astype(np.int64)
    return both >> 32, both & 0xFFFFFFFF


def _overlaps(index: _Index, one_P: Ints, other_P: Ints) -> NDArray[np.float64]:
    """Return the Jaccard index of each pair's sets of n-grams."""
    grams = np.memmap(index.grams, np.uint32, "r")
    counts_R = np.diff(index.ends_R, prepend=0)
    sizes_P = counts_R[one_P] + counts_R[other_P]
    overlaps = [np.zeros(0)]
    edges = np.searchsorted(sizes_P.cumsum(), np.arange(PAIR_GRAMS, sizes_P.sum(), PAIR_GRAMS))
    for part in np.split(np.arange(len(one_P)), edges):
        sets = [_gathered(grams, index.ends_R[side[part]], counts_R[side[part]]) for side in (one_P, other_P)]
        both = np.sort(np.concatenate(sets))
        shared = both[1:][both[1:] == both[:-1]] >> np.uint64(32)
        shared_P = np.bincount(shared.astype(np.int64), minlength=len(part))
        overlaps.append(shared_P / (sizes_P[part] - shared_P))
    return np.concatenate(overlaps)


def _gathered(grams: NDArray[np.uint32], ends_P: Ints, counts_P: Ints) -> Hashes:
    """Return the n-grams of some rows, each with the number of its row among them in the upper 32 bits."""
    place_G = np.arange(counts_P.sum()) + np.repeat(ends_P - counts_P.cumsum(), counts_P)
    number_G = np.repeat(np.arange(len(counts_P), dtype=np.uint64), counts_P)
    keys_G: Hashes = number_G << np.uint64(32) | grams[place_G]
    return keys_G
